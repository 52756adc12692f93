"""The scoring loop: chunks of queries, each with the tiles of blocks that the causal windowing plan keeps."""

from typing import NamedTuple

from kernel_index.masks.causal_windowing_predicate.api import WindowingPlan, causal_windowing_plan
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.legal_blocks import num_blocks

QUERIES = 1024
"""Queries that are scored together."""

TILE_BLOCKS = 16
"""Blocks of a tile, the unit in which blocks of the future and before the window are skipped."""


class Chunk(NamedTuple):
    """Some queries, and the blocks that their plan leaves to be scored."""

    queries: slice
    blocks: slice
    plan: WindowingPlan


def chunks_of(mask: MaskContract, sizes: Sizes, block_size: int) -> tuple[Chunk, ...]:
    """The chunks of all queries, each with the tiles of blocks that its plan keeps."""
    blocks = num_blocks(sizes.keys, block_size)
    found = []
    for begin in range(0, sizes.queries, QUERIES):
        end = min(begin + QUERIES, sizes.queries)
        first = max(0, begin + sizes.one_offset)  # queries before the first key attend to nothing
        plan = causal_windowing_plan(
            num_blocks=blocks,
            tile_size=TILE_BLOCKS,
            block_stride=block_size,
            q_chunk_start=first,
            q_chunk_size=max(1, end + sizes.one_offset - first),
            left_window=mask.window_bounds[0],
        )
        tiles = plan.active_tiles
        low, high = (tiles[0], tiles[-1] + 1) if tiles else (0, 0)
        found.append(Chunk(slice(begin, end), slice(low * TILE_BLOCKS, min(high * TILE_BLOCKS, blocks)), plan))
    return tuple(found)
