"""The unions in PyTorch without a table of every query: a bitmap of each tile, or a sort of its entries."""

import torch
from torch import Tensor

from kernel_index.routing.union_selection_query_mask.contract import UnionCall, resolve_mode
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps


def union_eager(call: UnionCall) -> UnionMaps:
    is_selected = call.is_selected
    batch, queries, groups, entries = call.selected.shape
    tile, tiles, blocks = call.query_tile_size, call.tiles, call.num_blocks
    index = torch.where(is_selected, call.selected.to(torch.int64), blocks)
    index = torch.nn.functional.pad(index, (0, 0, 0, 0, 0, tiles * tile - queries), value=blocks)
    tiled = index.view(batch, tiles, tile, groups, entries).transpose(2, 3).flatten(3)  # [B, tiles, K, tile·n]
    build = {"bitmap": _by_bitmap, "sort": _by_sort}[resolve_mode(call.mode, tiled.shape[-1], blocks)]
    union, sizes, ranks = build(tiled, blocks, call.width)
    ranks = ranks.view(batch, tiles, groups, tile, entries).transpose(2, 3).flatten(1, 2)[:, :queries]
    return UnionMaps(union, sizes, torch.where(is_selected, ranks, -1).to(torch.int32), is_selected)


def _by_bitmap(tiled: Tensor, num_blocks: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mark, count along the blocks, and let every marked block write itself at its rank."""
    shape = tiled.shape[:3]
    marks = torch.zeros((*shape, num_blocks + 1), dtype=torch.int32, device=tiled.device)
    marks.scatter_(-1, tiled, 1)
    marks[..., num_blocks] = 0  # the column of entries that select nothing
    rank = marks.cumsum(-1, dtype=torch.int32) - 1
    block = torch.arange(num_blocks + 1, dtype=torch.int32, device=tiled.device).expand_as(rank)
    return _listed(block, rank, marks > 0, width), marks.sum(-1, dtype=torch.int32), rank.gather(-1, tiled)


def _by_sort(tiled: Tensor, num_blocks: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort, number the runs of equal blocks, and let the first of each run write itself at its number."""
    ordered, origin = tiled.sort(-1)
    is_new = ordered < num_blocks
    is_new[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
    rank = is_new.cumsum(-1, dtype=torch.int32) - 1
    ranks = torch.empty_like(rank).scatter_(-1, origin, rank)
    return _listed(ordered.to(torch.int32), rank, is_new, width), is_new.sum(-1, dtype=torch.int32), ranks


def _listed(block: Tensor, rank: Tensor, kept: Tensor, width: int) -> Tensor:
    """The kept blocks at their ranks, then −1."""
    listed = torch.full((*block.shape[:-1], width + 1), -1, dtype=torch.int32, device=block.device)
    listed.scatter_(-1, torch.where(kept, rank, width).to(torch.int64), block)
    return listed[..., :width].contiguous()
