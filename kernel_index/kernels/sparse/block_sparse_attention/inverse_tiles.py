"""Inverts a selection: per key block, the queries that selected it, split into fixed-size tiles (synchronises)."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import Intervals, Sizes
from kernel_index.routing.legal_blocks import num_blocks

ROWS = 256
"""Rows of a tile, a row being one head of one query: enough to fill a matrix product with one block of keys."""


class InverseTiles(NamedTuple):
    """Tiles of up to P queries that selected the same key block.

    ``rows`` int64 [tiles, P]: ``(b·T + t)·G + g`` of each entry.  ``kept`` (bool, the same shape) is False for entries
    beyond a tile's last one, which repeat its first, and where a query selects a block again.
    ``block`` int64 [tiles]: ``(b·K + KV head)·blocks + j``.
    The first ``opening`` tiles hold each query's last block and every block of which the token mask forbids a part:
    ``low`` and ``high`` int32 [opening, P] bound its allowed keys.  In all other tiles every key is allowed.
    """

    rows: Tensor
    kept: Tensor
    block: Tensor
    opening: int
    low: Tensor
    high: Tensor


def inverse_tiles(
    selected: Tensor, selected_valid: Tensor | None, bounds: Intervals, sizes: Sizes, heads: tuple[int, int], size: int
) -> InverseTiles:
    """Tiles of a selection [B, T, G, n]; ``heads`` are the KV heads and the query heads, ``size`` the block's."""
    batch, queries, groups, count = selected.shape
    kv_heads, query_heads = heads
    blocks = num_blocks(sizes.keys, size)
    per_tile = max(1, ROWS * groups // query_heads)
    start, end = (bound[:, :, None, None] for bound in bounds)
    begin = selected.to(torch.int32) * size
    stop = (begin + size).clamp(max=sizes.keys)
    legal = (selected >= 0) & (begin < end) & (stop > start)
    if selected_valid is not None:
        legal &= selected_valid
    reached = torch.where(legal, selected, -1)
    last = reached.amax(-1, keepdim=True) if count else reached
    whole = (begin >= start) & (stop <= end) & (reached != last)
    lists = batch * groups * blocks
    device = selected.device
    first_list = torch.arange(batch * groups, device=device).view(batch, groups)[:, None, :, None] * blocks
    listed = torch.where(legal, first_list + selected + whole * lists, 2 * lists)
    which, origin = torch.sort(listed.flatten(), stable=True)
    lengths = torch.bincount(which, minlength=2 * lists + 1)[: 2 * lists]
    begins = lengths.cumsum(0) - lengths
    tiles = (lengths + per_tile - 1) // per_tile
    owner = torch.repeat_interleave(torch.arange(2 * lists, device=device), tiles)
    nth = torch.arange(owner.shape[0], device=device) - (tiles.cumsum(0) - tiles)[owner]
    at = (begins[owner] + nth * per_tile)[:, None] + torch.arange(per_tile, device=device)
    kept = at < (begins + lengths)[owner][:, None]
    at = torch.where(kept, at, at[:, :1])
    query = origin // max(1, count)
    again = torch.zeros_like(which, dtype=torch.bool)  # the sort is stable: duplicates are neighbours
    again[1:] = (which[1:] == which[:-1]) & (query[1:] == query[:-1])
    rows, kept = query[at], kept & ~again[at]
    opening = int(tiles[:lists].sum())
    block = owner % max(1, lists)
    group = block // max(1, blocks)
    block = (group // groups * kv_heads + group % groups * kv_heads // groups) * blocks + block % max(1, blocks)
    first = (block[:opening] % max(1, blocks) * size)[:, None]
    token = rows[:opening] // groups
    token = token if bounds.start.shape[0] == batch else token % max(1, queries)
    low, high = (bound.flatten()[token] - first for bound in bounds)
    return InverseTiles(rows, kept, block, opening, low.to(torch.int32), high.to(torch.int32))
