"""The tiles of keys that each tile of queries visits in a tree, from a few numbers of each tile."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import rules
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


class Ranges(NamedTuple):
    """What decides about a pair of tiles, as numbers of tiles: int16, or int32 where there are many.

    Key tile j is visited by query tile i only if ``first[i] ≤ j < last[i]`` and ``seen[j] > i``, and is full exactly if
    ``first_full[i] ≤ j < last_full[i]`` and ``seen_by_all[j] > i``.
    """

    first: Tensor
    last: Tensor
    first_full: Tensor
    last_full: Tensor
    seen: Tensor
    seen_by_all: Tensor


def ranges_of(bounds: RowBounds, keys: int, q_block: int, kv_block: int) -> Ranges:
    """The ranges of every tile, in O(T + S)."""
    start, end, q_end = bounds
    queries = start.shape[1]
    if q_end is None:
        q_end = torch.full((start.shape[0], keys), queries, dtype=torch.int32, device=start.device)
    some, nobody = start < end, torch.iinfo(torch.int32).max - kv_block
    start_low, start_high = _by_tile(torch.where(some, start, nobody), q_block, nobody)
    end_low, end_high = _by_tile(torch.where(some, end, 0), q_block, 0)
    seen_low, seen_high = _by_tile(q_end, kv_block, 0)
    found = (
        start_low // kv_block,
        -(-end_high // kv_block),
        -(-start_high // kv_block),
        end_low // kv_block,
        -(-seen_high // q_block),
        seen_low // q_block,
    )
    tiles = max(-(-keys // kv_block), -(-queries // q_block))
    return Ranges(*(x.clamp(max=tiles).to(_index_dtype(tiles)) for x in found))


def _index_dtype(tiles: int) -> torch.dtype:
    return torch.int16 if tiles < 2**15 - 1 else torch.int32


def _by_tile(x: Tensor, block: int, filler: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each tile of x [rows, n]; ``filler`` stands after the last."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=filler)
    lowest, highest = x.unflatten(1, (-1, block)).aminmax(dim=2)
    return lowest, highest


def tiles_of(ranges: Ranges) -> Tiles:
    """The tiles of a tree, by two comparisons of ranges and one of the subtrees for each pair.

    They are differences that must not be negative: on a CPU PyTorch subtracts five times as fast as it compares, where
    one operand is the same along a row.
    """
    row = torch.arange(ranges.first.shape[1], device=ranges.first.device, dtype=ranges.first.dtype)[:, None]
    column = _columns(ranges)
    first, last, first_full, last_full = (x[..., None] for x in ranges[:4])

    def inside(first: Tensor, last: Tensor, seen: Tensor) -> Tensor:
        least = torch.minimum(column - first, (last - 1) - column)
        return torch.minimum(least, seen[:, None] - (row + 1)) >= 0

    full = inside(first_full, last_full, ranges.seen_by_all)
    return Tiles(inside(first, last, ranges.seen) & ~full, full)


def _columns(ranges: Ranges) -> Tensor:
    return torch.arange(ranges.seen.shape[1], device=ranges.seen.device, dtype=ranges.seen.dtype)


def cover_of(ranges: Ranges, full: Tensor) -> BlockPlan:
    """One range of tiles that holds all visited ones, and in it the last range of full ones."""
    column = _columns(ranges)
    first = torch.minimum(ranges.first, ranges.last)
    last_full = first_full = first
    if column.shape[0]:
        last_full = torch.maximum((full * (column + 1)).amax(2), first)
        before = last_full[..., None] - column > 0
        first_full = torch.maximum(((before & ~full) * (column + 1)).amax(2), first)
    bounds = first, torch.maximum(ranges.last, last_full), first_full, last_full
    return BlockPlan(*(x.to(torch.int32) for x in bounds))


def lists_of(chosen: Tensor) -> TileLists:
    """The chosen columns of each row of bool [rows, n, m]; nothing waits for a device."""
    columns = chosen.shape[2]
    indices = torch.zeros(chosen.shape, dtype=torch.int32, device=chosen.device)
    if not columns:
        return TileLists(chosen.sum(2, dtype=torch.int32), indices)
    if rules.host_readable(chosen):
        counts = chosen.sum(2, dtype=torch.int32)
        row, column = chosen.flatten(0, 1).nonzero().T
        before = counts.flatten().cumsum(0) - counts.flatten()
        indices.flatten(0, 1)[row, torch.arange(len(row)) - before[row]] = column.to(torch.int32)
        return TileLists(counts, indices)
    slot = chosen.cumsum(2, dtype=torch.int32)
    # A column that is not chosen is written to one more slot, which is cut off.
    place = torch.where(chosen, slot - 1, columns).to(torch.int64)
    column = torch.arange(columns, device=chosen.device, dtype=torch.int32).expand(chosen.shape)
    indices = column.new_zeros(*chosen.shape[:2], columns + 1).scatter(2, place, column)
    return TileLists(slot[..., -1], indices[..., :columns].contiguous())


class Listed(NamedTuple):
    """The tiles of one side that are partly allowed, and those that are allowed whole."""

    partial: TileLists
    full: TileLists


def listed(bounds: RowBounds, keys: int, tile: tuple[int, int], *, by_key: bool) -> Listed:
    """For each tile of queries its tiles of keys, or ``by_key`` the reverse; nothing waits for a device."""
    if not torch.compiler.is_compiling() and bounds.start.is_cuda and rules.triton_why_not(*bounds) is None:
        return _by_kernels(bounds, keys, tile, by_key)
    tiles = tiles_of(ranges_of(bounds, keys, *tile))
    return Listed(*(lists_of(chosen.transpose(1, 2) if by_key else chosen) for chosen in tiles))


def _by_kernels(bounds: RowBounds, keys: int, tile: tuple[int, int], by_key: bool) -> Listed:
    from kernel_index.masks.prefix_tree.triton_tiles import lists

    counts, indices = lists(bounds, keys, tile, by_key=by_key)
    return Listed(*map(TileLists, counts, indices))
