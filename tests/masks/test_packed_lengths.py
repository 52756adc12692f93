"""``from_cu_seqlens`` and ``from_position_ids``: documents from what trainers already have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.masks.doc_window_mask.cases import dense_oracle

MANY = settings(max_examples=200, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(0, 5), min_size=0, max_size=4)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@MANY
@given(LENGTHS, st.integers(0, 3), st.booleans(), st.one_of(st.none(), st.integers(0, 3)))
def test_one_list_is_documents_and_padding(lengths, padding, causal, left):
    total = sum(lengths) + padding
    mask = ki.MaskContract.from_cu_seqlens(cumulative(lengths), causal=causal, window=(left, None))
    ids = torch.full((1, total), -1)
    ids[0, : sum(lengths)] = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    same = ki.MaskContract(causal, (left, None), ids)
    assert torch.equal(mask.dense(1, total), same.dense(1, total))
    assert torch.equal(mask.dense(1, total)[:, 0], dense_oracle(mask, 1, total, total))
    assert mask.varlen_why_not(1, total) is None
    assert torch.equal(mask.varlen(1, total).cu_seqlens_q, same.varlen(1, total).cu_seqlens_q)
    assert torch.equal(mask.segment_ids(1, total).kv, same.segment_ids(1, total).kv)


@MANY
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4), st.booleans(), st.integers(0, 2))
def test_two_lists_align_the_ends(pairs, causal, padding):
    of_queries, of_keys = (cumulative(x) for x in zip(*pairs, strict=True)) if pairs else (cumulative([]),) * 2
    queries, keys = int(of_queries[-1]) + padding, int(of_keys[-1]) + padding
    mask = ki.MaskContract.from_cu_seqlens(of_queries, of_keys, causal=causal, window=(2, None))
    expected = torch.zeros(1, queries, keys, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(
        *(torch.stack([x[:-1], x[1:]], 1).tolist() for x in (of_queries, of_keys)), strict=True
    ):
        alone = ki.MaskContract(causal, (2, None)).dense(1, q1 - q0, k1 - k0)
        expected[0, q0:q1, k0:k1] = alone[0, 0]
    assert torch.equal(mask.dense(1, queries, keys)[:, 0], expected)
    start, end = mask.intervals(1, queries, keys)
    assert (start.diff() >= 0).all()
    assert (end.diff() >= 0).all()
    assert mask.varlen_why_not(1, queries, keys) is not None


def test_nothing_waits_for_the_device():
    lengths = torch.tensor([0, 3, 8], device="meta")
    for lists in ((lengths, None), (lengths, lengths)):
        mask = ki.MaskContract.from_cu_seqlens(*lists)
        assert mask.intervals(1, 8, device="meta").start.is_meta
        assert mask.kernel_intervals(1, 8, device="meta").q_start.is_meta


def test_lengths_that_change_in_place_are_read_again():
    lengths = torch.tensor([0, 3, 8])
    mask = ki.MaskContract.from_cu_seqlens(lengths)
    before = mask.dense(1, 8).clone()
    lengths[1] = 5
    assert not torch.equal(mask.dense(1, 8), before)
    assert torch.equal(mask.dense(1, 8), ki.MaskContract.from_cu_seqlens(lengths).dense(1, 8))


@pytest.mark.parametrize(
    "backend", ["reference", "cpu", "sdpa", "triton", pytest.param("native", marks=pytest.mark.native)]
)
def test_attention_over_packed_rows(backend):
    torch.manual_seed(0)
    of_queries, of_keys = torch.tensor([0, 3, 3, 9]), torch.tensor([0, 8, 12, 20])
    q, k, v = torch.randn(1, 9, 4, 8), torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2, 8)
    out = ki.attention(q, k, v, ki.MaskContract.from_cu_seqlens(of_queries, of_keys), backend=backend)
    for q0, q1, k0, k1 in ((0, 3, 0, 8), (3, 9, 12, 20)):
        alone = ki.attention(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], backend="reference")
        torch.testing.assert_close(out[:, q0:q1], alone)


def test_positions_that_restart():
    ids = ki.MaskContract.from_position_ids(torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 1, 1]])).doc_ids
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 2]]
    assert ki.MaskContract.from_position_ids(torch.arange(4)).doc_ids.tolist() == [0] * 4
    assert ki.MaskContract.from_position_ids(torch.zeros(1, 0, dtype=torch.int64)).doc_ids.shape == (1, 0)
    mask = ki.MaskContract.from_position_ids(torch.arange(4), causal=False, window=(1, 0))
    assert (mask.causal, mask.window) == (False, (1, 0))


BAD = [
    ((torch.tensor([1, 3]), None), "cu_seqlens_q must begin with 0 and never decrease, got [1, 3]"),
    ((torch.tensor([0, 3, 2]), None), "cu_seqlens_q must begin with 0 and never decrease, got [0, 3, 2]"),
    ((torch.tensor([0, 3]), torch.tensor([0, 1, 2])), "cu_seqlens_k must have n + 1 numbers for n documents"),
    ((torch.zeros(0, dtype=torch.int64), None), "cu_seqlens_q must have n + 1 numbers for n documents"),
    ((torch.zeros(1, 2, dtype=torch.int64), None), "cu_seqlens_q must be cumulative lengths, shape [n + 1]"),
]


@pytest.mark.parametrize(("lists", "message"), BAD, ids=range(len(BAD)))
def test_lengths_that_are_none_are_refused(lists, message):
    with pytest.raises(ValueError) as refusal:
        ki.MaskContract.from_cu_seqlens(*lists)
    assert message in str(refusal.value)


def test_what_does_not_fit_packed_lengths_is_refused():
    lists = (torch.tensor([0, 3]), None)
    with pytest.raises(ValueError, match="cu_seqlens must be given without doc_ids and validity"):
        ki.MaskContract(doc_ids=torch.zeros(3, dtype=torch.int64), cu_seqlens=lists)
    assert ki.MaskContract(validity=ki.attention_validity(), cu_seqlens=lists).is_band is False  # no counts: absent
    with pytest.raises(ValueError, match="q_offset must be None: cu_seqlens place the queries, got 1"):
        ki.MaskContract(q_offset=1, cu_seqlens=lists)
    with pytest.raises(TypeError, match="cu_seqlens must be a pair"):
        ki.MaskContract(cu_seqlens=lists[0])
    with pytest.raises(ValueError, match="batch_size must be 1"):
        ki.MaskContract(cu_seqlens=lists).dense(2, 3)
    with pytest.raises(ValueError, match="seq_len must be kv_len under one list of cu_seqlens, 5, got 3"):
        ki.MaskContract(cu_seqlens=lists).dense(1, 3, 5)
    with pytest.raises(TypeError, match="position_ids must be an integer tensor"):
        ki.MaskContract.from_position_ids(torch.zeros(3))
