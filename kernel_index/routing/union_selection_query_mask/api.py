"""Join the picks of neighbouring queries, and keep for each query which of them are its own."""

import torch
from torch import Tensor

from kernel_index.routing.union_selection_query_mask import contract
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps

SORTED_ABOVE = 16
"""``auto`` sorts where there are more than this many blocks for each pick of a tile."""


def union_selection(
    selected: Tensor,
    *,
    query_tile_size: int,
    num_blocks: int,
    selected_valid: Tensor | None = None,
    mode: str = "auto",
) -> UnionMaps:
    """The blocks that each tile of queries picked together, ascending, and the place of each query's picks among them.

    A tile is ``query_tile_size`` consecutive queries, the last one may be shorter.  Its union is a list of at most
    ``U = min(query_tile_size · n, num_blocks)`` blocks, so it cannot overflow.  Going there and back again gives every
    pick, and no query gains a block that only its neighbours picked::

        union_block_indices[b, t // tile, g, query_union_indices[b, t, g, j]] == selected[b, t, g, j]     where valid

    Both modes give the same maps and static shapes, and wait for no device.  No gradient.

    Args:
        selected: integers [B, T, K, n], block indices in any order, duplicates allowed; negative for no pick.
        query_tile_size: queries of a tile.
        num_blocks: blocks there are.
        selected_valid: bool [B, T, K, n], False for no pick; None where the sign says it all.
        mode: ``"bitmap"`` marks blocks in a table of ``num_blocks`` for each tile, ``"sort"`` sorts a tile's picks;
            ``"auto"`` sorts only where blocks are many more than picks.

    Returns:
        ``UnionMaps``; a tile in which nothing is valid has size 0.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape or size does not fit, the mode is unknown, or a pick on the host is beyond the last block.

    Source: the union of rows in FlashInfer's sparse prefill and vLLM's query-shared attention, by other means.

    >>> import torch, kernel_index as ki
    >>> selected = torch.tensor([[4, 1], [1, -1], [0, 0]]).view(1, 3, 1, 2)
    >>> maps = ki.union_selection(selected, query_tile_size=2, num_blocks=5)
    >>> maps.union_block_indices.flatten(1).tolist(), maps.query_union_indices.flatten(1).tolist()
    ([[1, 4, -1, -1, 0, -1, -1, -1]], [[1, 0, 0, -1, 0, 0]])
    """
    contract.check(selected, query_tile_size, num_blocks, selected_valid, mode)
    picked = selected >= 0 if selected_valid is None else (selected >= 0) & selected_valid
    batch, queries, groups, picks = selected.shape
    tiles = -(-queries // query_tile_size)
    width = min(query_tile_size * picks, num_blocks)
    place = torch.where(picked, selected, num_blocks).to(torch.int64)
    place = torch.nn.functional.pad(place, (0, 0, 0, 0, 0, tiles * query_tile_size - queries), value=num_blocks)
    tiled = place.view(batch, tiles, query_tile_size, groups, picks).transpose(2, 3).flatten(3)  # [B, tiles, K, R·n]
    build = {"bitmap": _by_bitmap, "sort": _by_sort}[resolve_mode(mode, tiled.shape[-1], num_blocks)]
    union, sizes, ranks = build(tiled, num_blocks, width)
    ranks = ranks.view(batch, tiles, groups, query_tile_size, picks).transpose(2, 3).flatten(1, 2)[:, :queries]
    return UnionMaps(union, sizes, torch.where(picked, ranks, -1).to(torch.int32), picked)


def resolve_mode(mode: str, tile_picks: int, num_blocks: int) -> str:
    """The mode that ``auto`` stands for with this many picks in a tile."""
    if mode != "auto":
        return mode
    return "sort" if num_blocks > SORTED_ABOVE * tile_picks else "bitmap"


def _by_bitmap(tiled: Tensor, num_blocks: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mark, count along the blocks, and let every marked block write itself at its rank."""
    shape = tiled.shape[:3]
    marks = torch.zeros((*shape, num_blocks + 1), dtype=torch.int32, device=tiled.device)
    marks.scatter_(-1, tiled, 1)
    marks[..., num_blocks] = 0  # where everything that is no pick went
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
    """The kept blocks at their ranks, −1 behind them."""
    listed = torch.full((*block.shape[:-1], width + 1), -1, dtype=torch.int32, device=block.device)
    listed.scatter_(-1, torch.where(kept, rank, width).to(torch.int64), block)
    return listed[..., :width].contiguous()


def materialize_query_union_mask(maps: UnionMaps) -> Tensor:
    """Which places of its tile's union each query may use, bool [B, T, K, U]; for tests, kernels use the maps.

    Raises:
        TypeError: ``maps`` is not ``UnionMaps``.

    >>> import torch, kernel_index as ki
    >>> maps = ki.union_selection(torch.tensor([[[[0]], [[3]]]]), query_tile_size=2, num_blocks=4)
    >>> ki.materialize_query_union_mask(maps)[0, :, 0].int().tolist()
    [[1, 0], [0, 1]]
    """
    if not isinstance(maps, UnionMaps):
        raise TypeError(f"maps must be UnionMaps, got {type(maps).__name__}")
    width = maps.union_block_indices.shape[-1]
    place = torch.where(maps.query_union_valid, maps.query_union_indices, width).to(torch.int64)
    table = torch.zeros((*place.shape[:3], width + 1), dtype=torch.bool, device=place.device)
    return table.scatter_(-1, place, True)[..., :width]
