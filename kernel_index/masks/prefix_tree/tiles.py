"""The tiles of keys that each tile of queries visits in a tree, from a few numbers of each tile."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import BlockPlan, RowBounds


class Tiles(NamedTuple):
    """bool [rows, ceil(T / q_block), ceil(S / kv_block)]: tiles that need the mask, and tiles that are allowed whole.

    A tile with an allowed pair is in one of them.
    """

    partial: Tensor
    full: Tensor


class TileLists(NamedTuple):
    """Ascending indices of tiles: counts int32 [rows, n] and indices int32 [rows, n, m], 0 after the last."""

    counts: Tensor
    indices: Tensor


def tiles_of(bounds: RowBounds, keys: int, q_block: int, kv_block: int) -> Tiles:
    """The tiles of a tree, in O(T + S) and one comparison for each pair of tiles."""
    start, end, q_end = bounds
    if q_end is None:
        q_end = torch.full((start.shape[0], keys), start.shape[1], dtype=torch.int32, device=start.device)
    some, nobody = start < end, torch.iinfo(torch.int32).max
    start_low, start_high = _bounds_by_tile(torch.where(some, start, nobody), q_block, nobody)
    end_low, end_high = _bounds_by_tile(torch.where(some, end, 0), q_block, 0)
    seen_low, seen_high = _bounds_by_tile(q_end, kv_block, 0)
    first_query = torch.arange(start_low.shape[1], device=start.device, dtype=torch.int32)[:, None] * q_block
    first_key = torch.arange(seen_low.shape[1], device=start.device, dtype=torch.int32) * kv_block
    after_key, after_query = first_key + kv_block, first_query + q_block
    start_low, start_high, end_low, end_high = (x[..., None] for x in (start_low, start_high, end_low, end_high))
    seen_low, seen_high = seen_low[:, None], seen_high[:, None]
    full = (start_high <= first_key) & (end_low >= after_key) & (seen_low >= after_query)
    visited = (after_key > start_low) & (first_key < end_high) & (seen_high > first_query)
    return Tiles(visited & ~full, full)


def _bounds_by_tile(x: Tensor, block: int, filler: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each tile of x [rows, n]; ``filler`` stands after the last."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=filler)
    lowest, highest = x.unflatten(1, (-1, block)).aminmax(dim=2)
    return lowest, highest


def lists_of(chosen: Tensor) -> TileLists:
    """The chosen columns of each row of bool [rows, n, m]; nothing waits."""
    columns = chosen.shape[2]
    slot = chosen.cumsum(2, dtype=torch.int32)
    counts = slot[..., -1] if columns else chosen.sum(2, dtype=torch.int32)
    # A column that is not chosen is written to one more slot, which is cut off.
    slot = torch.where(chosen, slot - 1, columns).to(torch.int64)
    column = torch.arange(columns, device=chosen.device, dtype=torch.int32).expand(chosen.shape)
    indices = column.new_zeros(*chosen.shape[:2], columns + 1).scatter(2, slot, column)
    return TileLists(counts, indices[..., :columns].contiguous())


def cover_of(tiles: Tiles) -> BlockPlan:
    """One range of tiles that holds all visited ones, and in it the last range of full ones."""
    columns = tiles.full.shape[2]
    column = torch.arange(columns, device=tiles.full.device, dtype=torch.int32)
    visited = tiles.partial | tiles.full
    last = torch.where(visited, column + 1, 0).amax(2)
    first = torch.minimum(torch.where(visited, column, columns).amin(2), last)
    last_full = torch.where(tiles.full, column + 1, 0).amax(2)
    broken = torch.where(~tiles.full & (column < last_full[..., None]), column + 1, 0).amax(2)
    last_full = torch.maximum(last_full, first)
    first_full = torch.minimum(torch.maximum(broken, first), last_full)
    return BlockPlan(*(x.to(torch.int32) for x in (first, last, first_full, last_full)))
