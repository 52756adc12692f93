"""Prefix trees: their packing, the mask that they mean, its lowerings, and attention along each path alone."""

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.kernels.attention.dense_attention import rectangles
from kernel_index.masks.doc_window_mask.cases import dense_oracle, tree_fields
from kernel_index.masks.prefix_tree.tiles import lists_of
from tests.masks.trees import ALIGN, forests, paths_of, places_of, tree_calls

MANY = settings(max_examples=200, deadline=None, derandomize=True)
FEW = settings(max_examples=25, deadline=None, derandomize=True)
BACKENDS = ["reference", "cpu", pytest.param("native", marks=pytest.mark.native), "triton"]


# --- the packing ---------------------------------------------------------------------------------------------------


@MANY
@given(forests(), ALIGN)
def test_a_packing_is_the_tree(tree, align):
    parents, lengths = tree
    found = ki.pack_tree(parents, lengths, align=align)
    places, length = places_of(parents, lengths, found), len(found.positions)
    depth: dict[int, int] = {}
    for run, parent in enumerate(parents):
        depth[run] = 0 if parent < 0 else depth[parent] + lengths[parent]
        before = -1 if parent < 0 else places[parent][-1]
        for i, place in enumerate(places[run]):
            assert found.positions[place] == depth[run] + i
            assert (place - depth[run] - i) % align == 0
            assert found.parent_of[place] == (before if i == 0 else places[run][i - 1])
            below = [p for r in descendants(parents, run) for p in places[r]]
            assert found.subtree_end[place] == max(below) + 1
    gaps = ~found.is_token
    assert torch.equal(found.subtree_end[gaps], torch.arange(length)[gaps])
    assert (found.parent_of[gaps] == -1).all()
    assert align > 1 or not gaps.any()
    expected = [(int(found.parent_of[t]), t) for t in range(length) if found.parent_of[t] >= 0]
    assert list(zip(*(x.tolist() for x in found.edges), strict=True)) == expected
    assert sorted(found.order.tolist()) == list(range(len(parents)))
    assert all(x.dtype == torch.int64 for x in (*found[:4], *found.edges))


def descendants(parents: list[int], run: int) -> list[int]:
    found = [run]
    for other in range(run + 1, len(parents)):
        if parents[other] in found:
            found.append(other)
    return found


BAD_TREES = [
    (([-1, 1], [1, 1]), ValueError, r"parents\[1\] must be an earlier run, 0 to 0, or -1 for a root, got 1"),
    (([-1, -2], [1, 1]), ValueError, r"parents\[1\] must be an earlier run, .* got -2"),
    (([0], [1]), ValueError, r"parents\[0\] must be -1: no run comes before the first, got 0"),
    (([-1, 0], [2, 0]), ValueError, r"lengths\[1\] must be at least 1, got 0"),
    (([-1], [1, 2]), ValueError, r"lengths must have one number for each of the 1 runs, got 2"),
    (([-1.0], [1]), TypeError, r"parents\[0\] must be an integer, got float"),
    ((torch.zeros(2), [1, 1]), TypeError, r"parents must be an integer tensor, got torch.float32"),
    (("ab", [1]), TypeError, r"parents must be a sequence of integers, got str"),
]


@pytest.mark.parametrize(("tree", "kind", "message"), BAD_TREES, ids=range(len(BAD_TREES)))
def test_what_is_no_tree_is_refused_by_the_run(tree, kind, message):
    with pytest.raises(kind, match=message) as refusal:
        ki.pack_tree(*tree)
    assert "\n" not in str(refusal.value)


def test_numbers_may_be_tensors_and_align_is_checked():
    expected = ki.pack_tree([-1, 0], [2, 3])
    found = ki.pack_tree(torch.tensor([-1, 0]), torch.tensor([2, 3], dtype=torch.int32))
    assert torch.equal(found.subtree_end, expected.subtree_end)
    with pytest.raises(ValueError, match="align must be at least 1, got 0"):
        ki.pack_tree([-1], [1], align=0)
    nothing = ki.pack_tree([], [])
    assert nothing.positions.shape == (0,)
    assert ki.MaskContract(window=(2, 0), subtree_end=nothing.subtree_end).dense(1, 0, 0).shape == (1, 1, 0, 0)


# --- the contract --------------------------------------------------------------------------------------------------

BAD_FIELDS = [
    ({"subtree_end": torch.tensor([3, 5, 3])}, "subtree_end[1] must be from 1 (a gap) to 3, got 5"),
    ({"subtree_end": torch.tensor([3, 3, 1])}, "subtree_end[2] must be from 2 (a gap) to 3, got 1"),
    (
        {"subtree_end": torch.tensor([3, 4, 4, 4])},
        "subtree_end must nest: run 1 at 1 must end by 3, where the subtree of run 0 at 0 ends, got 4",
    ),
    ({"subtree_end": torch.tensor([2, 2]), "causal": False}, "causal must be True in a tree"),
    ({"subtree_end": torch.tensor([2, 2]), "prefix": 1}, "prefix must be left out in a tree"),
    ({"subtree_end": torch.tensor([2, 2]), "positions": torch.zeros(3, dtype=torch.int64)}, "positions must be for"),
    ({"subtree_end": torch.zeros(1, 1, 1, dtype=torch.int64)}, "subtree_end must be [B, S], or [S]"),
    ({"prefix": -1}, "prefix must be at least 0, got -1"),
    ({"prefix": torch.zeros(2, 2, dtype=torch.int64)}, "prefix must be one number for each row, shape [B]"),
    ({"q_offset": torch.zeros(2, 2, dtype=torch.int64)}, "q_offset must be one number for each row, shape [B]"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError) as refusal:
        ki.MaskContract(**fields)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@MANY
@given(tree_calls(), st.integers(1, 5), st.integers(1, 5))
def test_every_lowering_is_the_rule(call, q_block, kv_block):
    mask, rows, queries, keys = call
    expected = dense_oracle(mask, rows, queries, keys)
    assert torch.equal(mask.dense(rows, queries, keys)[:, 0], expected)
    start, end, _ = mask.row_bounds(mask.sizes(rows, queries, keys))
    assert torch.equal((start < end).expand(rows, -1), expected.any(-1))
    b, q, k = torch.arange(rows)[:, None, None], torch.arange(queries)[:, None], torch.arange(keys)
    assert torch.equal(mask.mask_mod(rows, queries, keys)(b, torch.tensor(0), q, k), expected)
    sides = mask.kernel_intervals(rows, queries, keys)
    by_query = (k >= sides.k_start[..., None]) & (k < sides.k_end[..., None])
    by_key = (q >= sides.q_start[:, None]) & (q < sides.q_end[:, None])
    assert torch.equal((by_query & by_key).expand(rows, -1, -1), expected)
    tiles = mask.row_tiles(q_block, kv_block, mask.sizes(rows, queries, keys))
    for row in range(rows):
        partial, full = (x[row if len(x) > 1 else 0] for x in tiles)
        assert not (partial & full).any()
        for i in range(partial.shape[0]):
            for j in range(partial.shape[1]):
                tile = expected[row, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
                assert not tile.any() or partial[i, j] or full[i, j]
                assert not full[i, j] or (tile.shape == (q_block, kv_block) and tile.all())
    cover = mask.block_plan(q_block, kv_block, rows, queries, keys)
    column = torch.arange(tiles.full.shape[2])
    inside = (column >= cover.first[..., None]) & (column < cover.last[..., None])
    assert not ((tiles.partial | tiles.full) & ~inside).any()
    certain = (column >= cover.first_full[..., None]) & (column < cover.last_full[..., None])
    assert not (certain & ~tiles.full).any()


@MANY
@given(st.integers(1, 3), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**40))
def test_lists_hold_the_chosen_columns(rows, n, m, seed):
    chosen = torch.rand(rows, n, m, generator=torch.Generator().manual_seed(seed)) < 0.5
    counts, indices = lists_of(chosen)
    for row in range(rows):
        for i in range(n):
            assert indices[row, i, : counts[row, i]].tolist() == chosen[row, i].nonzero().flatten().tolist()


def test_a_tree_visits_few_tiles_beyond_its_paths():
    """Eight leaves on one prompt: a leaf visits its prompt and itself, and no other leaf."""
    tree = ki.pack_tree([-1, *[0] * 8], [4096, *[512] * 8])
    plan = ki.MaskContract(subtree_end=tree.subtree_end).flex_block_mask(128)
    visited = plan.kv_num_blocks[0, 0] + plan.full_kv_num_blocks[0, 0]
    assert visited.tolist() == [*range(1, 33), *[32 + i for _ in range(8) for i in range(1, 5)]]
    assert int(plan.kv_num_blocks.sum()) == 32 + 8 * 4, "the diagonal alone needs the mask"


def test_intervals_and_packed_lengths_decline():
    mask = ki.MaskContract(**tree_fields(13))
    with pytest.raises(ValueError, match="keys of a query are not one interval"):
        mask.intervals()
    with pytest.raises(ValueError, match="keys of a query are not one interval"):
        mask.varlen()
    with pytest.raises(ValueError, match="no form for a tree"):
        mask.segment_ids()
    assert "not one interval" in str(mask.varlen_why_not())


def test_copies_equality_and_the_memo():
    fields = {"subtree_end": tree_fields(13)["subtree_end"]}
    mask = ki.MaskContract(window=(2, 0), **fields)
    twin = pickle.loads(pickle.dumps(mask))
    assert twin == mask
    assert hash(twin) == hash(mask)
    assert dataclasses.replace(mask, window=(3, 0)) != mask
    assert ki.MaskContract(subtree_end=fields["subtree_end"]) != ki.MaskContract()
    assert torch.equal(mask.to("cpu").dense(), mask.dense())
    first = mask.dense()
    assert mask.dense() is first
    fields["subtree_end"][0] = 13  # a chain now
    assert torch.equal(mask.dense(), ki.MaskContract(window=(2, 0), **fields).dense())
    assert not torch.equal(mask.dense(), first)


def test_a_tree_is_an_argument_of_a_compiled_function():
    def lower(x, mask):
        return x.sum(), mask.dense(), mask.kernel_intervals()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lower, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 13, 21):
        mask = ki.MaskContract(window=(5, 0), **tree_fields(n))
        _, dense, sides = compiled(torch.ones(2, n), mask)
        assert torch.equal(dense, mask.dense())
        for a, e in zip(sides, mask.kernel_intervals(), strict=True):
            assert torch.equal(a, e)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- attention -----------------------------------------------------------------------------------------------------


def leaves_of(length: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((4, 16), (2, 16), (2, 16))
    return [torch.randn(1, length, *s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@FEW
@given(forests(), ALIGN, st.one_of(st.none(), st.integers(0, 5)))
def test_the_law_outputs_and_gradients_are_those_of_each_path_alone(tree, align, left):
    """Each token's gradient from above counts once: on the first path that has it."""
    packing = ki.pack_tree(*tree, align=align)
    q, k, v = leaves_of(len(packing.positions), torch.float64)
    mask = ki.MaskContract(window=(left, 0), subtree_end=packing.subtree_end, positions=packing.positions)
    out = ki.attention(q, k, v, mask, backend="reference")
    above = torch.randn_like(out)
    seen: set[int] = set()
    expected, alone = torch.zeros_like(out), 0.0
    for path in paths_of(*tree, packing):
        one = ki.attention(*(x[:, path] for x in (q, k, v)), ki.MaskContract(window=(left, 0)), backend="reference")
        new = [i for i, place in enumerate(path) if place not in seen]
        places = [path[i] for i in new]
        expected[:, places] = one[:, new].detach()
        alone = alone + (one[:, new] * above[:, places]).sum()
        seen |= set(path)
    real = packing.is_token
    torch.testing.assert_close(out[:, real], expected[:, real])
    together = torch.autograd.grad((out * above)[:, real].sum(), (q, k, v))
    for a, b in zip(together, torch.autograd.grad(alone, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.thorough_if(when=lambda backend: backend == "triton")
def test_tiles_of_a_long_tree(backend):
    """Full, masked and skipped tiles; a run that ends inside a tile; several trees in a row."""
    tree = ki.pack_tree([-1, 0, 1, 1, 0, -1, 5, 5], [150, 40, 70, 33, 90, 20, 64, 65])
    mask = ki.MaskContract(subtree_end=tree.subtree_end)
    leaves = leaves_of(len(tree.positions), torch.float32)
    wide = [x.detach().double().requires_grad_() for x in leaves]

    def results(tensors, name):
        out, lse = ki.attention_with_lse(*tensors, mask, backend=name)
        g = torch.Generator().manual_seed(1)
        above = [torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse)]
        return out, lse, *torch.autograd.grad([out, lse], tensors, above)

    for actual, exact in zip(results(leaves, backend), results(wide, "reference"), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "backend", ["reference", "cpu", "sdpa", pytest.param("native", marks=pytest.mark.native), "triton"]
)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.thorough_if(when=lambda backend, documents: backend == "triton")
def test_chains_have_the_bits_of_plain_rows(backend, documents):
    lengths = [70, 1, 59] if documents else [130]
    tree = ki.pack_tree([-1] * len(lengths), lengths)
    ids = torch.repeat_interleave(torch.tensor(lengths)) if documents else None
    leaves = leaves_of(130, torch.float32)
    for window in ((None, 0), (20, 0)):
        plain, chained = (
            ki.attention(*leaves, mask, backend=backend)
            for mask in (
                ki.MaskContract(window=window, doc_ids=ids),
                ki.MaskContract(window=window, subtree_end=tree.subtree_end, positions=tree.positions),
            )
        )
        assert torch.equal(plain, chained)
        gradients = [torch.autograd.grad(x, leaves, torch.ones_like(x)) for x in (plain, chained)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("native", marks=pytest.mark.native)])
def test_gradients_of_a_shared_prompt_are_summed_in_float32(backend, monkeypatch):
    """Sums over many tiles of answers would lose digits in bfloat16, one rounding does not."""
    monkeypatch.setattr(rectangles, "QUERIES", 8)
    tree = ki.pack_tree([-1, *[0] * 40], [20, *[60] * 40])
    mask = ki.MaskContract(subtree_end=tree.subtree_end)
    leaves = leaves_of(len(tree.positions), torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found, exact = (
        torch.autograd.grad(ki.attention(*x, mask, backend=b).sum(), x[2])[0].double()
        for x, b in ((leaves, backend), (wide, "reference"))
    )
    prompt = slice(0, 20)
    relative = ((found - exact).abs() / exact.abs())[:, prompt]
    # Weights are rounded to bfloat16 before their product: half a unit each, and another one of the sum itself.
    assert relative.max() <= 1.5 * torch.finfo(torch.bfloat16).eps
