"""Every lowering for other people's kernels against the rule for one pair of tokens."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernel_index as ki
from kernel_index.masks.doc_window_mask import lowerings
from kernel_index.masks.doc_window_mask.cases import CASES, dense_oracle, packed
from tests.masks.contracts import calls

MANY = settings(max_examples=400, deadline=None, derandomize=True)
NAMED = [pytest.param(c, id=c.name) for c in CASES]


@MANY
@given(calls())
def test_the_kernel_intervals_say_the_same_by_query_and_by_key(call):
    mask, rows, queries, keys = call
    found = mask.kernel_intervals(rows, queries, keys)
    dense = dense_oracle(mask, rows, queries, keys)
    for bound in found:
        assert bound.dtype == torch.int32
        assert bound.is_contiguous()
        assert (bound.diff(dim=1) >= 0).all()
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    by_query = (key >= found.k_start[..., None]) & (key < found.k_end[..., None])
    by_key = (query >= found.q_start[:, None]) & (query < found.q_end[:, None])
    assert torch.equal(by_query.expand(rows, -1, -1), dense)
    assert torch.equal(by_key.expand(rows, -1, -1), dense)


@MANY
@given(calls())
def test_mask_mod_is_the_dense_mask(call):
    mask, rows, queries, keys = call
    rule = mask.mask_mod(rows, queries, keys)
    b, q, k = torch.arange(rows)[:, None, None], torch.arange(queries)[:, None], torch.arange(keys)
    assert torch.equal(rule(b, torch.tensor(0), q, k), dense_oracle(mask, rows, queries, keys))


@MANY
@given(calls(), st.integers(1, 5), st.integers(1, 5))
def test_flex_block_mask_visits_what_it_must_and_skips_the_rule_only_where_it_may(call, q_block, kv_block):
    mask, rows, queries, keys = call
    queries, keys = max(queries, 1), keys if mask.doc_ids is not None else max(keys, 1)
    if keys == 0:
        return
    found = mask.flex_block_mask((q_block, kv_block), rows, queries, keys)
    dense = dense_oracle(mask, rows, queries, keys)
    shape = (rows, 1, -(-queries // q_block), -(-keys // kv_block))
    listed = {}
    for name, counts, indices in (
        ("partial", found.kv_num_blocks, found.kv_indices),
        ("full", found.full_kv_num_blocks, found.full_kv_indices),
    ):
        assert counts.shape == shape[:3]
        assert indices.dtype == counts.dtype == torch.int32
        assert (counts >= 0).all()
        for b in range(rows):
            for i in range(shape[2]):
                picked = indices[b, 0, i, : counts[b, 0, i]].tolist()
                assert len(set(picked)) == len(picked)
                listed[name, b, i] = set(picked)
    for b in range(rows):
        for i in range(shape[2]):
            assert not listed["partial", b, i] & listed["full", b, i]
            for j in range(shape[3]):
                tile = dense[b, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
                whole = tile.shape == (q_block, kv_block) and bool(tile.all())
                assert (j in listed["full", b, i]) == whole
                assert not tile.any() or j in listed["full", b, i] | listed["partial", b, i]
    backward = found.q_num_blocks.sum(), found.full_q_num_blocks.sum()
    assert backward == (found.kv_num_blocks.sum(), found.full_kv_num_blocks.sum())


@pytest.mark.parametrize("case", NAMED)
def test_flex_block_mask_is_create_block_masks(case):
    """Rows without an empty query: block for block what PyTorch finds by evaluating the rule everywhere."""
    mask = case.build(40, 40)
    rule = mask.mask_mod(2, 40, 40)
    found = mask.flex_block_mask(8, 2, 40, 40)
    expected = create_block_mask(rule, 2, None, 40, 40, device="cpu", BLOCK_SIZE=8)
    ours, theirs = found.to_dense(), expected.to_dense()
    assert not (theirs.bool() & ~ours.bool()).any()
    filled = dense_oracle(mask, 2, 40, 40).any(-1).view(2, 1, 5, 8).all(-1)
    assert torch.equal(ours[filled], theirs[filled])
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_our_block_mask(case):
    mask = case.build(13, 13)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 13, 16), torch.randn(2, 2, 13, 16), torch.randn(2, 2, 13, 16)
    actual = flex_attention(q, k, v, block_mask=mask.flex_block_mask(128, 2, 13, 13), enable_gqa=True)
    expected = ki.attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, backend="reference")
    torch.testing.assert_close(actual.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def unpacked(found: lowerings.Varlen, rows: int, queries: int, keys: int) -> torch.Tensor:
    """The dense mask that packed sequences with a bottom-right window mean."""
    flat = torch.zeros(rows * queries, rows * keys, dtype=torch.bool)
    left, right = found.window
    tokens = torch.arange(rows * max(queries, keys)) if found.kept is None else found.kept
    for i in range(len(found.cu_seqlens_q) - 1):
        q_from, q_to = found.cu_seqlens_q[i : i + 2].tolist()
        k_from, k_to = found.cu_seqlens_k[i : i + 2].tolist()
        for t in range(q_to - q_from):
            here = t + (k_to - k_from) - (q_to - q_from)
            low = 0 if left < 0 else max(0, here - left)
            high = k_to - k_from if right < 0 else min(k_to - k_from, here + right + 1)
            for s in range(low, max(low, high)):
                flat[tokens[q_from + t], tokens[k_from + s]] = True
    blocks = flat.view(rows, queries, rows, keys)
    outside = torch.eye(rows, dtype=torch.bool)[:, None, :, None]
    assert not (blocks & ~outside).any(), "a sequence of one row reaches into another"
    return torch.stack([blocks[b, :, b] for b in range(rows)])


@MANY
@given(calls())
def test_varlen_is_the_dense_mask_or_refuses(call):
    mask, rows, queries, keys = call
    expressible = mask.q_offset is None or mask.q_offset == keys - queries
    if not mask.is_band:
        expressible = expressible and queries == keys
    reason = mask.varlen_why_not(rows, queries, keys)
    assert (reason is None) == expressible
    if not expressible:
        with pytest.raises(ValueError, match="packed lengths") as error:
            mask.varlen(rows, queries, keys)
        assert reason in str(error.value)
        return
    found = mask.varlen(rows, queries, keys)
    for cumulative, longest in zip(found[:2], found[2:4], strict=True):
        assert cumulative.dtype == torch.int32
        assert longest == max([0, *cumulative.diff().tolist()])
    assert torch.equal(unpacked(found, rows, queries, keys), dense_oracle(mask, rows, queries, keys))


@MANY
@given(calls())
def test_segment_ids_with_causality_and_window_are_the_dense_mask(call):
    mask, rows, queries, keys = call
    of_queries, of_keys = mask.segment_ids(rows, queries, keys)
    assert of_queries.dtype == of_keys.dtype == torch.int32
    assert of_queries.shape == (rows, queries)
    assert of_keys.shape == (rows, keys)
    bare = dense_oracle(dataclasses.replace(mask, doc_ids=None, validity=None), rows, queries, keys)
    same = of_queries[:, :, None] == of_keys[:, None]
    assert torch.equal(bare & same, dense_oracle(mask, rows, queries, keys))


@pytest.mark.parametrize("case", NAMED)
def test_only_varlen_waits_for_the_device(case):
    """The meta device has no values: reading one raises."""
    mask = case.build(13, 13).to("meta")
    assert mask.kernel_intervals(2, 13, 13, device="meta").q_start.is_meta
    if not mask.is_tree and mask.prefix is None:
        assert mask.segment_ids(2, 13, 13, device="meta").q.is_meta
    if mask.is_band and mask.varlen_why_not(2, 13, 13) is None:
        assert mask.varlen(2, 13, 13, device="meta").cu_seqlens_q.is_meta


def test_layers_share_what_was_lowered_and_a_changed_batch_is_lowered_again():
    ids = packed(13)
    mask = ki.MaskContract(doc_ids=ids)
    first = mask.flex_block_mask(4), mask.varlen(), mask.kernel_intervals(), mask.segment_ids()
    again = mask.flex_block_mask(4), mask.varlen(), mask.kernel_intervals(), mask.segment_ids()
    assert all(a is b for a, b in zip(first, again, strict=True))
    ids[:, 5:] = 3
    fresh = ki.MaskContract(doc_ids=ids)
    assert torch.equal(mask.varlen().cu_seqlens_q, fresh.varlen().cu_seqlens_q)
    assert torch.equal(mask.flex_block_mask(4).to_dense(), fresh.flex_block_mask(4).to_dense())
    assert mask.varlen() is not first[1]


def test_kernel_intervals_inside_a_compiled_function():
    def lower(x, mask):
        return x.sum(), mask.kernel_intervals(), mask.segment_ids()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lower, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 13, 21):
        mask = ki.MaskContract(window=(5, 0), doc_ids=packed(n))
        _, found, segments = compiled(torch.ones(2, n), mask)
        expected = (*mask.kernel_intervals(), *mask.segment_ids())
        for a, e in zip((*found, *segments), expected, strict=True):
            assert torch.equal(a, e)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
