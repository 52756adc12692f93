"""Lists of tiles by kernels are those by PyTorch, for trees and intervals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.masks.prefix_tree import triton_tiles
from kernel_index.masks.prefix_tree.tiles import listed
from tests.masks.contracts import calls
from tests.masks.test_prefix_trees import tree_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted on a CPU")

TILES = st.sampled_from([(1, 1), (4, 3), (3, 4), (8, 8)])


def both(mask, rows, queries, keys, tile, by_key):
    bounds = mask.row_bounds(mask.sizes(rows, queries, keys, torch.device("cpu")))
    counts, indices = triton_tiles.lists(bounds, keys, tile, by_key=by_key)
    for i, kind in enumerate(listed(bounds, keys, tile, by_key=by_key)):
        assert torch.equal(counts[i], kind.counts)
        assert torch.equal(indices[i], kind.indices)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.one_of(tree_calls(), calls()), TILES, st.booleans())
def test_kernels_make_the_same_lists(call, tile, by_key):
    both(*call, tile, by_key)


@pytest.mark.parametrize(("by_key", "tile"), [(False, (15, 1)), (True, (1, 15))])
def test_more_tiles_than_a_program_takes_together(by_key, tile):
    """Chunks of 128 tiles; several trees, and documents with padding."""
    tree = ki.pack_tree([-1, 0, 0, 2, -1, 4], [70, 14, 20, 21, 13, 14])
    both(ki.MaskContract(subtree_end=tree.subtree_end), 1, 152, 152, tile, by_key)
    ids = torch.tensor([0] * 90 + [-1] * 7 + [1] * 55)
    both(ki.MaskContract(doc_ids=ids, window=(60, 0)), 2, 152, 152, tile, by_key)
