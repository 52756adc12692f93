"""The mask contract: its parts, its sizes, its lowerings' cost, and what is kept between calls."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_index as ki
from kernel_index.masks.doc_window_mask import mask as mask_module
from kernel_index.masks.doc_window_mask.cases import CASES, dense_oracle, packed
from kernel_index.masks.doc_window_mask.contract import normalize_window

NAMED = [pytest.param(c, id=c.name) for c in CASES]


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (5, 13), (13, 5)])
def test_named_contracts(case, queries, keys):
    mask = case.build(queries, keys)
    assert torch.equal(mask.dense(2, queries, keys)[:, 0], dense_oracle(mask, 2, queries, keys))


# --- the rule itself, written out -------------------------------------------------------------------------------


def rows_of(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if s else "." for s in row) for row in mask[0, 0].tolist()]


def test_documents_padding_and_an_id_that_comes_back():
    ids = torch.tensor([[5, 5, 2, -1, -1, 5]])
    assert rows_of(ki.doc_window_mask(1, 6, device="cpu", doc_ids=ids, causal=False)) == [
        "xx....",
        "xx....",
        "..x...",
        "......",
        "......",
        ".....x",
    ]


def test_windows_are_flash_attentions():
    def rows(**call):
        return rows_of(ki.doc_window_mask(1, 4, device="cpu", **call))

    assert rows(window_size=(1, 0)) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(window_size=(0, 0)) == ["x...", ".x..", "..x.", "...x"]
    assert rows(window_size=(0, 1), causal=False) == ["xx..", ".xx.", "..xx", "...x"]
    everything = ["x...", "xx..", "xxx.", "xxxx"]
    for glob in ((-1, -1), (None, None), (-1, 0), (None, 5), (3, 0), (-7, -7)):
        assert rows(window_size=glob) == everything
    assert rows(window_size=(None, 0), causal=False) == everything


def test_a_valid_prefix_trims_queries_and_keys():
    mask = ki.doc_window_mask(2, 3, device="cpu", valid_token_counts=torch.tensor([2, 0]), causal=False)
    assert mask[:, 0].tolist() == [[[True, True, False]] * 2 + [[False] * 3], [[False] * 3] * 3]


def test_none_aligns_bottom_right_and_zero_is_not_none():
    """T ≠ S is where the two differ; for T = S they are the same mask."""
    chunk = ki.MaskContract()
    assert rows_of(chunk.dense(1, 2, 4)) == ["xxx.", "xxxx"]
    assert rows_of(ki.MaskContract(q_offset=0).dense(1, 2, 4)) == ["x...", "xx.."]
    assert rows_of(ki.MaskContract(q_offset=1).dense(1, 2, 4)) == ["xx..", "xxx."]
    assert rows_of(ki.doc_window_mask(1, 2, device="cpu", kv_len=4)) == ["xxx.", "xxxx"]
    assert rows_of(ki.doc_window_mask(1, 2, device="cpu", kv_len=4, q_offset=0)) == ["x...", "xx.."]
    assert torch.equal(chunk.dense(1, 4), ki.MaskContract(q_offset=0).dense(1, 4))
    # A prefill in chunks is the whole mask, row by row.
    whole = ki.MaskContract(window=(2, 0)).dense(1, 6)
    parts = [ki.MaskContract(window=(2, 0), q_offset=t).dense(1, 2, 6) for t in (0, 2, 4)]
    assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize(
    "extra", [{}, {"valid_token_counts": [3, 2, 1]}, {"doc_ids": torch.zeros(3, 4, dtype=torch.int32)}]
)
def test_the_batch_dimension_is_always_there(extra):
    mask = ki.doc_window_mask(3, 4, device="cpu", **extra)
    assert mask.shape == (3, 1, 4, 4)
    mask[1, 0, 0, 0] = False  # an ordinary tensor: rows do not share memory
    assert mask[0, 0, 0, 0]


def test_rank_1_ids_are_every_rows_documents():
    ids = torch.tensor([0, 0, 1, 1])
    expected = ki.doc_window_mask(2, 4, device="cpu", doc_ids=ids.expand(2, 4))
    assert torch.equal(ki.doc_window_mask(2, 4, device="cpu", doc_ids=ids), expected)
    with pytest.raises(ValueError, match="batch_size must be 1"):  # but a batch of one is not spread
        ki.doc_window_mask(2, 4, device="cpu", doc_ids=ids[None])


# --- arguments -----------------------------------------------------------------------------------------------------


def test_every_spelling_of_a_window_has_one_normal_form():
    assert normalize_window((-1, -1)) == normalize_window((None, -5)) == normalize_window(None) == (None, None)
    assert normalize_window([3, 0]) == (3, 0)
    for bad in (3, (1, 2, 3), "ab1", {1, 2}):
        with pytest.raises(ValueError, match=r"window must be a pair \(left, right\), got"):
            normalize_window(bad)
    for bad in ((1.0, 0), (True, 0), ("1", 0)):
        with pytest.raises(TypeError, match=r"window\[0\] must be an integer, got"):
            ki.MaskContract(window=bad)


IDS = torch.zeros(2, 4, dtype=torch.int64)
BAD = [
    (lambda: ki.MaskContract(causal=1), TypeError, "causal must be True or False, got int"),
    (lambda: ki.MaskContract(doc_ids=[[0]]), TypeError, "doc_ids must be a torch.Tensor, got list"),
    (lambda: ki.MaskContract(doc_ids=IDS.float()), TypeError, "doc_ids must be an integer tensor, got torch.float32"),
    (lambda: ki.MaskContract(doc_ids=IDS[None]), ValueError, "doc_ids must be [B, S], or [S] for every row alike"),
    (lambda: ki.MaskContract(validity=[1]), TypeError, "validity must be an AttentionValidity, got list"),
    (lambda: ki.MaskContract(q_offset=1.0), TypeError, "q_offset must be an integer, got float"),
    (lambda: ki.MaskContract(q_offset=True), TypeError, "q_offset must be an integer, got bool"),
    (
        lambda: ki.MaskContract(doc_ids=IDS, validity=ki.attention_validity(valid_token_counts=[1])),
        ValueError,
        "validity must be for the 2 rows of doc_ids, got 1 rows",
    ),
    (lambda: ki.MaskContract().dense(), ValueError, "seq_len must be given where the contract has no doc_ids"),
    (lambda: ki.MaskContract(doc_ids=IDS).dense(3), ValueError, "batch_size must be 2, the size of the contract's"),
    (lambda: ki.MaskContract(doc_ids=IDS).dense(2, 4, 5), ValueError, "kv_len must be 4, the size of doc_ids [B, S]"),
    (lambda: ki.MaskContract().dense(1, -1), ValueError, "kv_len must be at least 0, got -1"),
    (lambda: ki.MaskContract().dense(1, 2.0), TypeError, "kv_len must be an integer, got float"),
    (lambda: ki.MaskContract(doc_ids=IDS).dense(device="meta"), ValueError, "doc_ids must be on meta, got cpu"),
    (lambda: ki.MaskContract().block_plan(0, 4, 1, 8), ValueError, "q_block must be at least 1, got 0"),
    (lambda: ki.MaskContract().block_plan(4, -1, 1, 8), ValueError, "kv_block must be at least 1, got -1"),
    (lambda: ki.doc_window_mask(-1, 4, device="cpu"), ValueError, "batch_size must be at least 0, got -1"),
    (lambda: ki.doc_window_mask(1, 4, device="cpu", doc_ids=IDS[:1, :3]), ValueError, "kv_len must be 3, the size of"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[m for _, _, m in BAD])
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind) as refusal:
        call()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_sizes_come_from_the_contract_where_it_carries_them():
    docs = ki.MaskContract(doc_ids=packed(7))
    assert docs.dense().shape == (2, 1, 7, 7)
    assert docs.dense(seq_len=3).shape == (2, 1, 3, 7)
    assert docs.intervals().start.shape == (2, 7)
    assert docs.block_plan(2, 2).first.shape == (2, 4)
    prefix = ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[1, 2, 3]))
    assert prefix.dense(seq_len=4).shape == (3, 1, 4, 4)
    assert ki.MaskContract().dense(seq_len=4).shape == (1, 1, 4, 4)
    assert ki.MaskContract().dense(5, 4, 6).shape == (5, 1, 4, 6)
    assert ki.MaskContract().dense(kv_len=6).shape == (1, 1, 6, 6)
    assert ki.MaskContract(doc_ids=torch.zeros(1, 0, dtype=torch.int64)).dense().shape == (1, 1, 0, 0)


def test_a_dense_mask_above_8192_queries_must_be_asked_for():
    with pytest.raises(ValueError, match=r"dense_mask_too_large: it would take 49158 bytes") as refusal:
        ki.doc_window_mask(2, 8193, device="cpu", kv_len=3)
    assert "seq_len must be at most 8192" in str(refusal.value)
    assert "got 8193" in str(refusal.value)
    with pytest.raises(ValueError, match="dense_mask_too_large"):
        ki.MaskContract().dense(1, 8193, 1)
    assert ki.MaskContract().dense(1, 8193, 1, allow_large=True).shape == (1, 1, 8193, 1)
    assert ki.doc_window_mask(1, 8193, device="cpu", kv_len=1, allow_large=True).shape == (1, 1, 8193, 1)
    assert ki.doc_window_mask(1, 8192, device="cpu", kv_len=1).shape == (1, 1, 8192, 1)


# --- what it costs -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation in the block made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_intervals_and_block_plans_never_cost_the_square():
    length = 40_000
    docs = ki.MaskContract(window=(512, 0), doc_ids=(torch.arange(length) // 300)[None])
    with Largest() as seen:
        docs.intervals()
        docs.block_plan(128, 128)
    assert seen.numel <= length + 1
    with Largest() as seen:  # without documents not even the length
        ki.MaskContract(window=(512, 0)).block_plan(128, 128, 1, length)
    assert seen.numel <= 2 * -(-length // 128)


@pytest.mark.parametrize("case", NAMED)
def test_no_lowering_waits_for_a_device(case):
    """The meta device has no values: reading one raises."""
    mask = case.build(13, 13).to("meta")
    assert mask.dense(2, 13, 13, device="meta").device.type == "meta"
    assert mask.row_bounds(mask.sizes(2, 13, 13, "meta")).start.device.type == "meta"
    assert mask.flex_block_mask(4, 2, 13, 13, device="meta").kv_indices.device.type == "meta"
    assert mask.block_plan(4, 4, 2, 13, 13, device="meta").last_full.device.type == "meta"


# --- what is kept --------------------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """How often intervals were computed."""
    calls = []
    real = mask_module.interval_of

    def counting(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(mask_module, "interval_of", counting)
    return calls


def test_twelve_layers_build_a_mask_once(built):
    mask = ki.MaskContract(window=(4, 0), doc_ids=packed(13))
    masks = [mask.dense() for _ in range(12)]
    plans = [mask.block_plan(4, 4) for _ in range(12)]
    assert all(m is masks[0] for m in masks)
    assert len(plans) == 12
    assert len(built) == 2
    assert mask.dense(seq_len=5).shape[2] == 5
    assert len(built) == 3


def _through_numpy(t):
    t.numpy()[0, 0] = 77


def _through_data(t):
    t.data[0, 0] = 77


def _in_place(t):
    t[0, 0] = 77


@pytest.mark.parametrize("change", [_in_place, _through_data, _through_numpy])
@pytest.mark.parametrize("inference", [False, True])
def test_changing_a_tensor_in_place_changes_the_result(change, inference):
    with torch.inference_mode(inference):
        ids = packed(9).clone()
        mask = ki.MaskContract(doc_ids=ids)
        before = mask.dense().clone()
        mask.block_plan(2, 2), mask.intervals()
        change(ids)
        assert not torch.equal(mask.dense(), before)
        assert torch.equal(mask.dense(), ki.MaskContract(doc_ids=ids).dense())
        fresh = ki.MaskContract(doc_ids=ids)
        for actual, expected in zip(mask.block_plan(2, 2), fresh.block_plan(2, 2), strict=True):
            assert torch.equal(actual, expected)
        assert torch.equal(mask.intervals().start, fresh.intervals().start)


def test_changing_the_counts_in_place_changes_the_result():
    counts, slots = torch.tensor([4, 2]), torch.tensor([2, 2])
    valid = ki.attention_validity(valid_token_counts=counts, valid_slot_counts=slots, base_block_tokens=2)
    mask = ki.MaskContract(causal=False, validity=valid)
    assert mask.dense(seq_len=4).sum((1, 2, 3)).tolist() == [16, 4]
    counts[1] = 3
    assert mask.dense(seq_len=4).sum((1, 2, 3)).tolist() == [16, 9]
    slots.zero_()
    assert not mask.dense(seq_len=4).any()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("ids", [None, [[4, 4, 7, 7]]])
def test_a_result_that_somebody_wrote_to_is_not_given_out_again(inference, ids):
    with torch.inference_mode(inference):
        mask = ki.MaskContract(window=(2, 0), doc_ids=None if ids is None else torch.tensor(ids))
        mask.dense(1, 4).zero_()
        assert mask.dense(1, 4).any()
        mask.row_intervals(mask.sizes(1, 4)).end.zero_()
        assert mask.intervals(1, 4).end.any()


def test_a_mask_kept_in_inference_mode_serves_training(built):
    mask = ki.MaskContract(window=(2, 0))
    with torch.inference_mode():
        kept = mask.dense(1, 4)
    assert mask.dense(1, 4) is kept
    assert len(built) == 1
    assert not kept.is_inference()


def test_inference_shares_a_mask_among_layers(built):
    with torch.inference_mode():
        mask = ki.MaskContract(window=(4, 0), doc_ids=packed(13).clone())
        assert mask.dense() is mask.dense()
        assert len(built) == 1


def test_nothing_fake_outlives_its_mode():
    mask = ki.MaskContract(window=(2, 0))
    with FakeTensorMode():
        mask.dense(1, 4)
    assert type(mask.dense(1, 4)) is torch.Tensor
    seen = torch.func.vmap(lambda x: x * mask.dense(1, 4)[0, 0])(torch.ones(3, 4, 4))
    assert torch.equal(seen[0].bool(), mask.dense(1, 4)[0, 0])


def test_copies_and_pickles_carry_the_contract_alone():
    mask = ki.MaskContract(False, (1, 2), packed(2000)[:1], ki.attention_validity(valid_token_counts=[900]), 3)
    mask.dense()
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), dataclasses.replace(mask)):
        assert twin == mask
        assert torch.equal(twin.dense(), mask.dense())
    assert len(pickle.dumps(mask)) < 100_000


def test_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ki.MaskContract().causal = False


def test_equality_is_by_what_is_said():
    assert ki.MaskContract() == ki.MaskContract(window=(-1, 0)) == ki.MaskContract(causal=False, window=(None, 0))
    assert ki.MaskContract() == ki.MaskContract(validity=ki.attention_validity())
    assert ki.MaskContract() != ki.MaskContract(q_offset=0), "they differ where T ≠ S"
    assert ki.MaskContract() != ki.MaskContract(causal=False)
    assert ki.MaskContract(doc_ids=IDS) == ki.MaskContract(doc_ids=IDS.clone())
    assert ki.MaskContract(doc_ids=IDS) != ki.MaskContract(doc_ids=IDS + 1)
    assert ki.MaskContract(doc_ids=IDS) != ki.MaskContract()
    assert hash(ki.MaskContract(doc_ids=IDS)) == hash(ki.MaskContract(doc_ids=IDS.clone()))
    assert isinstance(hash(ki.MaskContract(doc_ids=IDS.to("meta"))), int)


# --- torch.compile -------------------------------------------------------------------------------------------------


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.thorough_if(when=lambda backend: backend == "inductor")
def test_a_contract_is_an_argument_of_a_compiled_function(backend):
    def lower(x, mask):
        return x.cumsum(1), mask.dense(), mask.intervals(), mask.block_plan(4, 2)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lower, fullgraph=True, dynamic=True, backend=backend)
    for n in (9, 13, 21):
        valid = ki.attention_validity(valid_slot_counts=torch.tensor([2, 3]), base_block_tokens=4)
        mask = ki.MaskContract(window=(5, 0), doc_ids=packed(n), validity=valid)
        _, dense, intervals, plan = compiled(torch.ones(2, n), mask)
        assert torch.equal(dense, mask.dense())
        for actual, expected in zip((*intervals, *plan), (*mask.intervals(), *mask.block_plan(4, 2)), strict=True):
            assert torch.equal(actual, expected)
    assert _graphs() == 1


def test_a_contract_is_made_replaced_and_closed_over_inside_a_compiled_function():
    outside = ki.MaskContract(window=(3, 0))
    outside.dense(1, 9)  # something is kept; a trace must not use it

    def lower(ids, counts):
        valid = ki.attention_validity(valid_token_counts=counts)
        mask = ki.MaskContract(doc_ids=ids, validity=valid)
        narrow = dataclasses.replace(mask, window=(2, 0))
        return mask.dense(), narrow.dense(), outside.dense(1, ids.shape[1])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lower, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 13, 21):
        call = packed(n), torch.tensor([n, n // 2])
        for actual, expected in zip(compiled(*call), lower(*call), strict=True):
            assert torch.equal(actual, expected)
    assert _graphs() == 1


def test_the_offset_of_a_compiled_decode_loop_is_no_constant():
    def step(q, mask, keys):
        return q + mask.dense(1, q.shape[0], keys).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for offset in (5, 6, 7, 8):
        mask = ki.MaskContract(q_offset=offset)
        assert torch.equal(compiled(torch.zeros(2), mask, 12), step(torch.zeros(2), mask, 12))
    assert _graphs() == 1
