"""Inputs of trees and packed lengths that a fresh reader found to break."""

import io

import pytest
import torch

import kernel_index as ki
from kernel_index.lm.trees import TokenTree, TreeBatch
from kernel_index.masks.doc_window_mask.cases import dense_oracle
from kernel_index.masks.prefix_tree.paths import branches_of
from kernel_index.nn import Mamba2

BACKENDS = ["reference", "cpu", "sdpa", pytest.param("native", marks=pytest.mark.native), "triton"]
KEYS = {"key_validity": ki.attention_validity(valid_token_counts=torch.tensor([3]))}
FORK = ki.pack_tree([-1, 0, 0, -1], [1, 1, 1, 1]).subtree_end
SEEING_NOTHING = {
    "a key count before the query": (ki.MaskContract(subtree_end=FORK, **KEYS), 4, 4),
    "a root behind the valid keys": (
        ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, -1, 2], [2, 1, 2, 2]).subtree_end, **KEYS), 7, 7,
    ),
    "queries behind the last key": (ki.MaskContract(subtree_end=FORK, q_offset=2), 4, 4),
    "a chain and queries behind the last key": (ki.MaskContract(subtree_end=torch.full((6,), 6), q_offset=4), 4, 6),
    "documents and a key count": (
        ki.MaskContract(subtree_end=FORK, doc_ids=torch.tensor([0, 0, 1, 1]), **KEYS), 4, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEING_NOTHING)
def test_bounds_are_equal_where_a_query_sees_nothing(name):
    mask, queries, keys = SEEING_NOTHING[name]
    expected = dense_oracle(mask, 1, queries, keys)
    assert torch.equal(mask.dense(1, queries, keys)[:, 0], expected)
    bounds = mask.row_bounds(mask.sizes(1, queries, keys))
    assert torch.equal(bounds.start < bounds.end, expected.any(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SEEING_NOTHING)
def test_a_query_that_sees_nothing_gives_zero(name, backend):
    mask, queries, keys = SEEING_NOTHING[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (queries, keys, keys))
    nothing = ~dense_oracle(mask, 1, queries, keys).any(-1)
    out = ki.attention(q, k, v, mask, backend=backend)
    assert (out[nothing] == 0).all()
    torch.testing.assert_close(out, ki.attention(q, k, v, mask, backend="reference"))
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][nothing] == 0).all()
    if backend != "sdpa":
        assert (ki.attention_with_lse(q, k, v, mask, backend=backend).lse[0, 0][nothing[0]] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_beyond_the_keys_are_refused_or_end_at_them(backend):
    lists = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 9])
    mask = ki.MaskContract.from_cu_seqlens(*lists, causal=False)
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="cu_seqlens_k must end by the 4 tokens, got 9"):
        ki.attention(x, x, x, mask, backend=backend)
    hidden = ki.MaskContract.from_cu_seqlens(*(x.to("meta") for x in lists))  # not read: clamped
    assert hidden.intervals(1, 4, 4, device="meta").end.is_meta
    with pytest.raises(ValueError, match="must begin with 0 and never decrease"):
        ki.MaskContract.from_cu_seqlens(torch.tensor([0, 5, 3], dtype=torch.uint8))


def test_bounds_of_lengths_that_were_not_read_stay_within_the_keys(monkeypatch):
    from kernel_index.masks.doc_window_mask import fields

    mask = ki.MaskContract.from_cu_seqlens(torch.tensor([0, 2, 4]), torch.tensor([0, 3, 900]), causal=False)
    monkeypatch.setattr(fields.rules, "host_readable", lambda *_: False)
    assert mask.intervals(1, 4, 6).end.max() <= 6


def test_positions_of_rows_beside_one_row_of_subtrees():
    positions = torch.tensor([[0, 1, 2, 1], [0, 2, 4, 2]])
    ends = ki.pack_tree([-1, 0, 0], [1, 2, 1]).subtree_end
    for fields in ({"subtree_end": ends}, {}):
        own = positions if fields else positions.cumsum(1)
        mask = ki.MaskContract(window=(1, 0), positions=own, **fields)
        assert torch.equal(mask.dense(2, 4, 4)[:, 0], dense_oracle(mask, 2, 4, 4))


def test_positions_that_do_not_increase_are_refused():
    mask = ki.MaskContract(window=(1, 0), positions=torch.tensor([0, 1, 1, 2]))
    with pytest.raises(ValueError, match="positions must increase along each path, got 1 at token 2"):
        mask.dense()


def test_counts_of_keys_alone_are_refused_in_a_routed_tree():
    """As in a plain row: keys behind the count were part of the means by which blocks are chosen."""
    x, chain = torch.randn(1, 6, 1, 4), torch.full((6,), 6)
    counts = {"key_validity": ki.attention_validity(valid_token_counts=torch.tensor([4]))}
    for fields in (counts, counts | {"subtree_end": chain}):
        with pytest.raises(ValueError, match="key_validity must be left out"):
            ki.moba_attention(x, x, x, block_size=2, topk=3, mask=ki.MaskContract(**fields))


def test_a_gap_attends_to_nothing_in_a_routed_tree():
    tree = ki.pack_tree([-1, 0, 0], [3, 1, 1], align=4)
    mask = ki.MaskContract(subtree_end=tree.subtree_end)
    x = torch.randn(1, len(tree.positions), 1, 4)
    config = ki.ClusteredSparseConfig(block_size=2, topk=2)
    out, lse = ki.clustered_sparse_attention_with_lse(x, x, x, config=config, mask=mask)
    assert (lse[0, 0][~tree.is_token] == -torch.inf).all()
    assert lse[0, 0][tree.is_token].isfinite().all()
    assert (out[0][~tree.is_token] == 0).all()


def test_tensors_without_values_are_refused():
    mask = ki.MaskContract(subtree_end=torch.full((4,), 4, device="meta"))
    x = torch.randn(1, 4, 1, 4, device="meta")
    with pytest.raises(ki.Ineligible, match="on the meta device has no values"):
        ki.moba_attention(x, x, x, block_size=2, topk=2, mask=mask)
    with pytest.raises(ValueError, match="subtree_end must hold values"):
        mask.tree_levels(1, 4, device="meta")
    with pytest.raises(ValueError, match="lengths must hold values"):
        ki.pack_tree([-1], torch.ones(1, dtype=torch.int64, device="meta"))


def test_empty_batches_and_rows_of_gaps():
    mask = ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, 0], [2, 1, 1]).subtree_end)
    q, w = torch.zeros(0, 4, 2, 4), torch.zeros(0, 4, 2)
    assert ki.lightning_indexer(q, torch.zeros(0, 4, 4), w, topk=2, mask=mask).indices.shape == (0, 4, 2)
    mixer = Mamba2(8, 2, 4, state=4)
    assert mixer(torch.zeros(0, 4, 8), mask)[0].shape == (0, 4, 8)
    gaps = ki.MaskContract(subtree_end=torch.arange(4))
    assert mixer(torch.zeros(1, 4, 8), gaps)[0].shape == (1, 4, 8)
    assert TreeBatch.of([TokenTree([], [])], length=3).sources.shape == (0,)


def test_numbers_and_types_of_a_batch_of_trees():
    ints = TreeBatch.of([TokenTree([-1, 0], [torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3])])])
    lists = TreeBatch.of([TokenTree([-1, 0], [[1, 2], [3]])])
    assert ints.mask == lists.mask
    assert all(torch.equal(a, b) for a, b in zip(ints, lists, strict=True) if isinstance(a, torch.Tensor))
    with pytest.raises(TypeError, match="length must be an integer, got str"):
        TreeBatch.of([], length="8")


def test_values_of_prefixes_are_checked_like_numbers():
    with pytest.raises(ValueError, match=r"prefix must be at least 0 in every row, got \[-1\]"):
        ki.MaskContract(prefix=torch.tensor([-1]))
    ids = torch.tensor([[0, 0, 1, 1]])
    for most in (2**63 - 1, torch.tensor([2**63 - 1])):
        mask = ki.MaskContract(doc_ids=ids, prefix=most)
        assert torch.equal(mask.dense(), ki.MaskContract(False, doc_ids=ids).dense())


def test_messages_name_what_was_given():
    lists = ki.MaskContract.from_cu_seqlens(torch.tensor([0, 2, 4]), torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="batch_size must be 1, the size of the contract's cu_seqlens, got 2"):
        lists.intervals(2, 4)
    with pytest.raises(ValueError, match="batch_size must be 3, the size of the contract's q_offset, got 2"):
        ki.MaskContract(q_offset=torch.zeros(3, dtype=torch.int64)).intervals(2, 4)
    x = torch.randn(1, 4, 1, 4)
    with pytest.raises(ValueError, match="cu_seqlens must be one list where blocks are routed, got two"):
        ki.moba_attention(x, x, x, block_size=2, topk=2, mask=lists)
    assert "queries that differ from those of the keys" in str(lists.varlen_why_not(1, 4, 4))
    with pytest.raises(ValueError, match=r"parents\[0\] must be -1: no run comes before the first, got 0"):
        ki.pack_tree([0], [1])


def test_a_packing_is_saved_and_loaded():
    tree = ki.pack_tree([-1, 0], [2, 1])
    assert ki.pack_tree([], []).order.dtype == torch.int64
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).subtree_end, tree.subtree_end)


def test_a_tree_that_was_moved_is_taken_apart_without_a_wait():
    """On a device without values, by what the host knew when it was moved, until the moved tensors change."""
    ends = ki.pack_tree([-1, 0, 0, 2], [3, 2, 1, 2]).subtree_end
    mask = ki.MaskContract(subtree_end=ends)
    expected = mask.tree_levels(1, 8)
    sizes = mask.sizes(1, 8, 8)
    branches = branches_of(mask, sizes)
    moved = mask.to("meta")
    ends.fill_(8)  # a loader that fills its buffer again
    for level, there in zip(expected, moved.tree_levels(1, 8), strict=True):
        assert [x.shape for x in level[:4]] == [x.shape for x in there[:4]]
        assert there.index.is_meta
    found = branches_of(moved, sizes._replace(device=torch.device("meta")))
    assert found == branches
    moved.subtree_end.add_(0)
    with pytest.raises(ValueError, match="must hold values"):
        moved.tree_levels(1, 8)


def test_a_batch_that_is_moved_keeps_what_the_host_knows():
    batch = TreeBatch.of([TokenTree([-1, 0, 0], [torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8])])])
    moved = batch.to("meta")
    assert all(x.is_meta for x in (moved.tokens, moved.mask.subtree_end, moved.targets))
    assert [len(level.parent) for level in moved.mask.tree_levels(1, 4)] == [1, 2]


def test_a_tree_is_moved_in_inference_mode():
    """Tensors that are made there count no writes, so nothing that is known of them is kept."""
    mask = ki.MaskContract(subtree_end=FORK.clone())
    with torch.inference_mode():
        moved = mask.to("meta")
    assert moved.subtree_end.is_meta
    assert moved.on_the_host() is None
    assert mask.to("meta").on_the_host() is not None


def test_what_the_host_keeps_of_a_moved_tree_is_its_row_alone():
    """A loader may hold its rows in one large tensor."""
    rows = FORK.expand(1000, -1).clone()
    known = ki.MaskContract(subtree_end=rows[3]).to("meta").on_the_host()
    assert torch.equal(known.subtree_end, FORK)
    assert known.subtree_end.untyped_storage().nbytes() == FORK.numel() * FORK.element_size()


def test_a_window_over_the_positions_of_one_row_serves_many_trees():
    tree = ki.pack_tree([-1, 0, 0], [3, 2, 1])
    ends = torch.stack([tree.subtree_end] * 2)
    found = ki.MaskContract(subtree_end=ends, positions=tree.positions, window=(1, 0)).dense()
    alone = ki.MaskContract(subtree_end=tree.subtree_end, positions=tree.positions, window=(1, 0)).dense()
    assert torch.equal(found, alone.expand_as(found))


def test_another_window_keeps_what_the_host_knows():
    tree = ki.pack_tree([-1, 0, 0], [3, 2, 1])
    moved = ki.MaskContract(subtree_end=tree.subtree_end, positions=tree.positions).to("meta").with_window(1, 0)
    assert moved.window == (1, 0)
    assert [len(level.parent) for level in moved.tree_levels(1, 6)] == [1, 2]
    assert moved.on_the_host().window == (1, 0)


def test_errors_name_the_row_of_several():
    with pytest.raises(ValueError, match=r"subtree_end\[1, 1\] must be from 1"):
        ki.MaskContract(subtree_end=torch.tensor([[3, 3, 3], [3, 9, 3]]))
    with pytest.raises(ValueError, match="run 1 of row 1 at 1 must end by 2"):
        ki.MaskContract(subtree_end=torch.tensor([[3, 3, 3], [2, 3, 3]]))


def test_trees_without_values_are_refused_by_a_reason():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tree = ki.pack_tree([-1, 0, 0], [3, 2, 1])
    with FakeTensorMode() as mode:
        mask = ki.MaskContract(subtree_end=mode.from_tensor(tree.subtree_end))
        with pytest.raises(ValueError, match="subtree_end must hold values"):
            mask.tree_levels(1, 6)


def test_along_paths_refuses_what_is_no_tree():
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="mask must be a MaskContract with subtree_end"):
        ki.along_paths(lambda q, k, mask: q, ki.MaskContract(), (x,), (x,))
    mask = ki.MaskContract(subtree_end=torch.tensor([3, 3, 3]))
    with pytest.raises(ValueError, match="must hold a tensor each"):
        ki.along_paths(lambda q, k, mask: q, mask, (), (x,))
