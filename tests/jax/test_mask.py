"""The JAX contract says what torch's says: the same intervals, the same errors."""

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import kernel_index as ki  # noqa: E402
import kernel_index.jax as kij  # noqa: E402
from kernel_index.jax.attention_pallas import interval_walk, tree_walk  # noqa: E402
from kernel_index.jax.block_walk import inverted  # noqa: E402
from kernel_index.jax.mask import as_contract  # noqa: E402
from kernel_index.masks.doc_window_mask.cases import CASES, packed  # noqa: E402
from tests.masks.trees import batch_of, forests  # noqa: E402

INTERVALS = [c for c in CASES if "tree" not in c.name and c.name != "chain"]


@pytest.mark.parametrize("case", INTERVALS, ids=lambda c: c.name)
def test_intervals_are_torchs(case):
    for queries, keys in ((13, 13), (5, 12)):
        mask = case.build(queries, keys)
        expected = mask.row_intervals(mask.sizes(2, queries, keys))
        found = jax.jit(lambda m, t=queries, s=keys: m.intervals(2, t, s))(as_contract(mask))
        for name in ("start", "end"):
            assert np.array_equal(getattr(found, name), getattr(expected, name).numpy())


@pytest.mark.parametrize("case", [c for c in CASES if c not in INTERVALS], ids=lambda c: c.name)
def test_a_tree_is_the_mask_of_torch(case):
    for queries, keys in ((13, 13), (5, 12)):
        mask = case.build(queries, keys)
        found = jax.jit(lambda m, t=queries, s=keys: m.dense(2, t, s))(as_contract(mask))
        assert np.array_equal(found, mask.dense(2, queries, keys).numpy())
        with pytest.raises(ValueError, match="mask must have intervals of keys: in a prefix tree"):
            as_contract(mask).intervals(2, queries, keys)


LONGEST = 40
DENSE = jax.jit(lambda mask, queries: mask.dense(1, queries, LONGEST), static_argnums=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(forests(), st.sampled_from([1, 2, 3]), st.sampled_from([None, 0, 3]), st.sampled_from([LONGEST, 11]))
def test_every_tree_is_the_mask_of_torch(tree, align, left, queries):
    """No value is read: one compilation serves all trees, chains and gaps."""
    fields = batch_of([ki.pack_tree(*tree, align=align), ki.pack_tree([-1], [LONGEST])])
    mask = ki.MaskContract(window=(left, 0), **{name: x[0] for name, x in fields.items()})
    assert np.array_equal(DENSE(as_contract(mask), queries), mask.dense(1, queries, LONGEST).numpy())


def test_offsets_and_prefixes_of_rows_meet_documents_and_counts():
    fields = {
        "doc_ids": packed(12),
        "validity": ki.attention_validity(valid_token_counts=[12, 7]),
        "q_offset": torch.tensor([6, -2]),
        "prefix": torch.tensor([3, 2]),
    }
    numbers = {name: fields[name] for name in ("q_offset", "prefix")}
    for causal, window, chosen in ((True, (2, 0), fields), (False, (1, 1), fields), (True, (None, 0), numbers)):
        mask = ki.MaskContract(causal, window, **chosen)
        dense = jax.jit(lambda m: m.dense(2, 9, 12))(as_contract(mask))
        assert np.array_equal(dense, mask.dense(2, 9, 12).numpy())


def test_packed_lengths_become_documents():
    mask = ki.MaskContract.from_cu_seqlens(torch.tensor([0, 2, 2, 5]))
    assert as_contract(mask).doc_ids.tolist() == [[0, 0, 2, 2, 2]]
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 1, 4)), jnp.float32)
    longer = kij.MaskContract(doc_ids=jnp.array([[0, 0, 2, 2, 2, -1, -1]]))
    assert np.array_equal(kij.attention(q, q, q, mask), kij.attention(q, q, q, longer))
    with pytest.raises(ValueError, match="seq_len must be kv_len under one list of cu_seqlens, 7, got 6"):
        kij.attention(q[:, :6], q, q, mask)
    two = ki.MaskContract.from_cu_seqlens(torch.tensor([0, 2]), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seqlens must have one list for JAX, got two"):
        kij.attention(q, q, q, two)


def test_a_mask_is_a_pytree_with_traced_leaves():
    ids = jnp.array([[0, 0, 1, 1]])

    @jax.jit
    def ends(mask):
        return mask.intervals(1, 4, 4).end

    assert ends(kij.MaskContract(doc_ids=ids, q_offset=0)).tolist() == [[1, 2, 3, 4]]
    assert ends(kij.MaskContract(causal=False, doc_ids=ids + 5)).tolist() == [[2, 2, 4, 4]]


BAD = (
    lambda m, v: m(causal=1),
    lambda m, v: m(window=(1, 2, 3)),
    lambda m, v: m(window=(1.5, 0)),
    lambda m, v: m(q_offset=1.0),
    lambda m, v: m(prefix=-1),
    lambda m, v: m(prefix=0.5),
    lambda m, v: m(validity=[3]),
    lambda m, v: v(valid_token_counts=[1.5]),
    lambda m, v: v(valid_token_counts=[-1]),
    lambda m, v: v(valid_slot_counts=[1]),
    lambda m, v: v(valid_token_counts=[1, 2], valid_slot_counts=[1], base_block_tokens=4),
    lambda m, v: v(attention_meta=[]),
)


@pytest.mark.parametrize("call", BAD)
def test_errors_are_torchs(call):
    with pytest.raises((TypeError, ValueError)) as expected:
        call(ki.MaskContract, ki.attention_validity)
    with pytest.raises(type(expected.value)) as found:
        call(kij.MaskContract, kij.attention_validity)
    assert str(found.value) == str(expected.value)


BAD_TREES = (
    {"subtree_end": [3, 5, 3]},
    {"subtree_end": [3, 3, 1]},
    {"subtree_end": [3, 4, 4, 4]},
    {"subtree_end": [2, 2], "causal": False},
    {"subtree_end": [2, 2], "prefix": 1},
    {"subtree_end": [2, 2], "positions": [0, 1, 2]},
    {"subtree_end": [2, 2], "doc_ids": [[0, 1, 2]]},
    {"positions": [[0, 1]], "doc_ids": [[0, 0], [0, 0]]},
    {"subtree_end": [[[2, 2]]]},
)


@pytest.mark.parametrize("fields", BAD_TREES, ids=range(len(BAD_TREES)))
def test_errors_of_trees_are_torchs(fields):
    with pytest.raises(ValueError) as expected:
        ki.MaskContract(**{n: torch.tensor(x) if isinstance(x, list) else x for n, x in fields.items()})
    with pytest.raises(ValueError) as found:
        kij.MaskContract(**{n: np.array(x) if isinstance(x, list) else x for n, x in fields.items()})
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("name", ["q_offset", "prefix"])
def test_numbers_of_rows_are_checked(name):
    with pytest.raises(ValueError, match=rf"{name} must be one number for each row, shape \[B\], got shape \(1, 2\)"):
        kij.MaskContract(**{name: jnp.ones((1, 2), int)})
    with pytest.raises(TypeError, match=f"{name} must be an integer array, got float32"):
        kij.MaskContract(**{name: jnp.ones(2)})
    with pytest.raises(ValueError, match=f"{name} must be for the 3 rows of doc_ids, got 2 rows"):
        kij.MaskContract(doc_ids=jnp.zeros((3, 4), int), **{name: np.array([1, 2])})


def test_a_mask_of_other_sizes_is_refused():
    q = jnp.ones((2, 6, 1, 4))
    with pytest.raises(ValueError, match="batch_size must be 3"):
        kij.attention(q, q, q, kij.MaskContract(prefix=jnp.ones(3, int)))
    with pytest.raises(ValueError, match="kv_len must be 5"):
        kij.attention(q, q, q, kij.MaskContract(doc_ids=jnp.zeros((2, 5), int)))
    with pytest.raises(ValueError, match="batch_size must be 3"):
        kij.attention(q, q, q, kij.MaskContract(doc_ids=jnp.zeros((3, 6), int)))
    with pytest.raises(TypeError, match="mask must be a MaskContract, got str"):
        kij.attention(q, q, q, "causal")


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("packed", "window", "prefix", "both_sides", "prefix_lm", "row_offsets")],
    ids=lambda c: c.name,
)
def test_a_walk_visits_the_blocks_that_the_mask_touches_and_no_other(case):
    tile, block, tokens = 4, 3, 26
    mask = case.build(tokens, tokens)
    dense = np.pad(mask.dense(2, tokens, tokens)[:, 0].numpy(), ((0, 0), (0, 2), (0, 1)))
    needed = dense.reshape(2, 7, tile, 9, block).any((2, 4))

    @jax.jit
    def plan(mask):
        walk = interval_walk(mask, tokens, tokens, tile, block)
        return walk, inverted(walk, 9)

    walk, by_keys = plan(as_contract(mask))
    for b in range(walk.spans.shape[0]):
        count, first = np.asarray(walk.spans[b, 0])
        visited = (np.arange(9) >= first[:, None]) & (np.arange(9) < (first + count)[:, None])
        assert (visited >= needed[b]).all()
        wanted = needed[b].any(1) & dense[b, : tile * 7].reshape(7, tile, -1).any(2).all(1)  # every query sees a key
        span = [np.flatnonzero(row)[[0, -1]] if row.any() else (0, -1) for row in needed[b]]
        widths = np.array([last - first + 1 for first, last in span])
        assert (visited.sum(1) == widths)[wanted].all()
        back = np.asarray(by_keys.spans[b, 0])
        tiles = (np.arange(7) >= back[1][:, None]) & (np.arange(7) < (back[1] + back[0])[:, None])
        assert (visited <= tiles.T).all()


def visits(walk, blocks):
    """The listed blocks of every row, bool [B', rows, blocks]."""
    counts, lists = np.asarray(walk.spans[:, 0, 0]), np.asarray(walk.lists[:, 0, :, 0])
    assert all(
        len(set(row[:n])) == n for row, n in zip(lists.reshape(-1, lists.shape[-1]), counts.ravel(), strict=True)
    )
    listed = np.arange(lists.shape[-1]) < counts[..., None]
    return ((lists[..., None] == np.arange(blocks)) & listed[..., None]).any(2)


@pytest.mark.parametrize("case", [c for c in CASES if c not in INTERVALS], ids=lambda c: c.name)
def test_a_walk_over_a_tree_visits_the_blocks_that_the_mask_touches(case):
    tile, block, tokens = 4, 3, 26
    mask = case.build(tokens, tokens)
    dense = np.pad(mask.dense(2, tokens, tokens)[:, 0].numpy(), ((0, 0), (0, 2), (0, 1)))
    needed = dense.reshape(2, 7, tile, 9, block).any((2, 4))

    @jax.jit
    def plan(mask):
        walk = tree_walk(mask.row_bounds(2, tokens, tokens), tile, block)
        return walk, inverted(walk, 9)

    walk, by_keys = plan(as_contract(mask))
    visited = visits(walk, 9)
    assert (visited >= needed).all()
    assert np.array_equal(visits(by_keys, 7), visited.swapaxes(1, 2))


def test_a_walk_over_chains_is_that_over_documents():
    lengths = [9, 1, 14]
    documents = kij.MaskContract(window=(5, 0), doc_ids=np.repeat(np.arange(3), lengths))
    tree = ki.pack_tree([-1] * 3, lengths)
    chains = as_contract(ki.MaskContract(window=(5, 0), subtree_end=tree.subtree_end, positions=tree.positions))

    @jax.jit
    def walks(documents, chains):
        return interval_walk(documents, 24, 24, 4, 4), tree_walk(chains.row_bounds(1, 24, 24), 4, 4)

    plain, listed = walks(documents, chains)
    (count, first), visited = plain.spans[0, 0], visits(listed, 6)
    block = np.arange(6)
    assert np.array_equal(visited[0], (block >= first[:, None]) & (block < (first + count)[:, None]))


def test_a_leaf_visits_its_prompt_and_itself_and_no_other_leaf():
    tree = ki.pack_tree([-1, *[0] * 8], [4096, *[512] * 8])
    mask = as_contract(ki.MaskContract(subtree_end=tree.subtree_end))
    walk = jax.jit(lambda mask: tree_walk(mask.row_bounds(1, 8192, 8192), 128, 128))(mask)
    assert walk.spans[0, 0, 0].tolist() == [*range(1, 33), *[32 + i for _ in range(8) for i in range(1, 5)]]


def test_torch_masks_are_taken():
    mask = ki.MaskContract(
        window=(3, 0), doc_ids=torch.tensor([[0, 0, 1]]), validity=ki.attention_validity(valid_token_counts=[2])
    )
    assert as_contract(mask).intervals(1, 3, 3).end.tolist() == [[1, 2, 2]]


def test_packed_rows_are_those_of_torch():
    lengths, positions = [0, 2, 2, 5], [[0, 1, 0, 1, 2, 0], [3, 4, 5, 5, 6, 7]]
    found = kij.MaskContract.from_cu_seqlens(jnp.array(lengths), 7, window=(1, 0)).dense(1, 7, 7)
    expected = ki.MaskContract.from_cu_seqlens(torch.tensor(lengths), window=(1, 0)).dense(1, 7, 7)
    assert found.tolist() == expected.tolist()
    found = kij.MaskContract.from_position_ids(jnp.array(positions)).dense(2, 6, 6)
    assert found.tolist() == ki.MaskContract.from_position_ids(torch.tensor(positions)).dense(2, 6, 6).tolist()
    assert jax.jit(lambda p: kij.MaskContract.from_position_ids(p).doc_ids)(jnp.zeros((1, 0), int)).shape == (1, 0)
    with pytest.raises(ValueError, match="cu_seqlens must be cumulative lengths"):
        kij.MaskContract.from_cu_seqlens(jnp.zeros((2, 2), int), 3)
    with pytest.raises(TypeError, match="position_ids must be integers"):
        kij.MaskContract.from_position_ids(None)
