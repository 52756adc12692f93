"""Every lowering of a random contract against the rule for one pair of tokens, said in plain Python."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.masks.doc_window_mask.cases import dense_oracle
from tests.masks.contracts import calls

MANY = settings(max_examples=400, deadline=None, derandomize=True)


@MANY
@given(calls())
def test_dense_is_the_rule(call):
    mask, rows, queries, keys = call
    actual = mask.dense(rows, queries, keys)
    assert actual.shape == (rows, 1, queries, keys)
    assert actual.dtype == torch.bool
    assert torch.equal(actual[:, 0], dense_oracle(mask, rows, queries, keys))


@MANY
@given(calls())
def test_intervals_are_the_dense_rows_and_never_step_back(call):
    mask, rows, queries, keys = call
    start, end = mask.intervals(rows, queries, keys)
    for bound in (start, end):
        assert bound.shape == (rows, queries)
        assert bound.dtype == torch.int32
        assert bound.is_contiguous()
        assert (bound.diff(dim=1) >= 0).all()
        assert ((bound >= 0) & (bound <= keys)).all()
    assert (start <= end).all()
    key = torch.arange(keys)
    inside = (key >= start[..., None]) & (key < end[..., None])
    assert torch.equal(inside, dense_oracle(mask, rows, queries, keys))


@MANY
@given(calls(), st.integers(1, 6), st.integers(1, 6))
def test_block_plan_covers_what_is_allowed_and_full_blocks_need_no_mask(call, q_block, kv_block):
    mask, rows, queries, keys = call
    plan = mask.block_plan(q_block, kv_block, rows, queries, keys)
    dense = dense_oracle(mask, rows, queries, keys)
    for bound in plan:
        assert bound.shape == (rows, -(-queries // q_block))
        assert bound.dtype == torch.int32
    assert (plan.first <= plan.first_full).all()
    assert (plan.first_full <= plan.last_full).all()
    assert (plan.last_full <= plan.last).all()
    for b in range(rows):
        for i in range(plan.first.shape[1]):
            tile = dense[b, i * q_block : (i + 1) * q_block]
            touched = tile.any(0).nonzero().flatten() // kv_block
            first, last, first_full, last_full = (int(bound[b, i]) for bound in plan)
            if len(touched):
                assert first <= int(touched.min())
                assert last > int(touched.max())
            if tile.any(1).all():  # no empty row: as tight as one interval can be
                assert (first, last) == (int(touched.min()), int(touched.max()) + 1)
            for j in range(-(-keys // kv_block)):
                columns = tile[:, j * kv_block : (j + 1) * kv_block]
                whole = columns.shape[1] == kv_block and bool(columns.all())
                assert whole == (first_full <= j < last_full), (b, i, j)


def test_blocks_of_padding_are_not_visited():
    ids = torch.tensor([[3] * 4 + [-1] * 3 + [-2] * 5 + [8] * 4])
    plan = ki.MaskContract(doc_ids=ids).block_plan(4, 2)
    assert plan.first.tolist() == [[0, 2, 2, 6]]
    assert plan.last.tolist() == [[2, 2, 2, 8]]
    prefix = ki.attention_validity(valid_token_counts=[5])
    plan = ki.MaskContract(validity=prefix).block_plan(4, 2, seq_len=16)
    assert (plan.last - plan.first).tolist() == [[2, 3, 0, 0]]


@MANY
@given(calls())
def test_doc_window_mask_is_the_same_mask(call):
    mask, rows, queries, keys = call
    counts = None if mask.validity is None else mask.validity.tokens
    window = tuple(-1 if side is None else side for side in mask.window)
    actual = ki.doc_window_mask(
        rows,
        queries,
        device="cpu",
        valid_token_counts=counts,
        doc_ids=mask.doc_ids,
        window_size=window,
        causal=mask.causal,
        kv_len=keys,
        q_offset=mask.q_offset,
    )
    assert torch.equal(actual, mask.dense(rows, queries, keys))


@MANY
@given(calls(), calls())
def test_equal_contracts_have_equal_hashes_and_equal_masks(call, other):
    mask, rows, queries, keys = call
    twin = ki.MaskContract(
        mask.causal,
        mask.window,
        None if mask.doc_ids is None else mask.doc_ids.clone(),
        None if mask.validity is None else mask.validity.to("cpu"),
        mask.q_offset,
    )
    assert twin == mask
    assert hash(twin) == hash(mask)
    if other[0] == mask:
        assert hash(other[0]) == hash(mask)
        assert torch.equal(other[0].dense(rows, queries, keys), mask.dense(rows, queries, keys))


def test_the_drawn_contracts_are_worth_drawing():
    """Otherwise the tests above could pass by drawing nothing but empty or trivial masks."""
    seen = {"returning": 0, "padding": 0, "zero_rows": 0, "windows": 0, "uneven": 0, "slots": 0, "partly": 0}

    @MANY
    @given(calls())
    def count(call):
        mask, rows, queries, keys = call
        ids = [] if mask.doc_ids is None else mask.document_rows(keys).tolist()
        for row in ids:
            runs = [i for p, i in enumerate(row) if p == 0 or row[p - 1] != i]
            seen["returning"] += len(runs) > len(set(runs))
            seen["padding"] += any(i < 0 for i in row)
        counts = None if mask.validity is None else mask.validity.token_counts(keys)
        seen["zero_rows"] += counts is not None and bool((counts == 0).any())
        seen["slots"] += mask.validity is not None and mask.validity.mode == "slot_prefix"
        seen["windows"] += mask.window != (None, None)
        seen["uneven"] += queries != keys
        dense = mask.dense(rows, queries, keys)
        seen["partly"] += bool(dense.any()) and not bool(dense.all())

    count()
    assert min(seen.values()) >= 15, seen
