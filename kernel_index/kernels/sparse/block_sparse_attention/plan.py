"""What the Triton kernels visit, from the picks: sorted once, of static size, without waiting for the device.

``forward_plan`` costs a sort of each tile's picks, ``key_plan``, which only a backward pass needs, one of all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.triton.launch import ceil_div


class Plan(NamedTuple):
    """Of each tile of queries the union of its picks, ascending; P = tile · n places, as many as it has picks.

    ``blocks`` int32 [B, G, tiles, P], of which the first ``sizes`` [B, G, tiles] count; ``members`` int64, the same
    shape: bit q of a place is set where query q of the tile picked that block.  ``pairs`` int32, the same shape: the
    tile's picks as ``block · tile + query``, ascending, with ``num_blocks · tile`` for what counts no more.
    """

    blocks: Tensor
    members: Tensor
    sizes: Tensor
    pairs: Tensor


def forward_plan(selected: Tensor, selected_valid: Tensor | None, num_blocks: int, tile: int) -> Plan:
    """``selected`` [B, T, G, n]; ``tile`` queries, a power of two up to 64, share a union."""
    batch, queries, groups, picks = selected.shape
    tiles, places = ceil_div(queries, tile), tile * picks
    is_pick = (selected >= 0) & (selected < num_blocks)
    if selected_valid is not None:
        is_pick = is_pick & selected_valid
    block = torch.where(is_pick, selected.to(torch.int32), num_blocks)
    block = torch.nn.functional.pad(block, (0, 0, 0, 0, 0, tiles * tile - queries), value=num_blocks)
    query = torch.arange(tile, dtype=torch.int32, device=selected.device)[:, None, None]
    pair = block.view(batch, tiles, tile, groups, picks) * tile
    pair = torch.where(pair < num_blocks * tile, pair + query, pair)
    pair = pair.permute(0, 3, 1, 2, 4).reshape(batch, groups, tiles, places).sort(-1).values
    before = torch.nn.functional.pad(pair[..., :-1], (1, 0), value=-1)
    block, is_pick = pair // tile, pair < num_blocks * tile
    is_new = is_pick & (block != before // tile)
    once = is_pick & (pair != before)
    # What is no pick goes to the last place, which is free where there is any.
    place = torch.where(is_pick, is_new.cumsum(-1) - 1, places - 1)
    bit = torch.where(once, 1 << (pair % tile).to(torch.int64), 0)
    members = torch.zeros_like(bit).scatter_add(-1, place, bit)
    union = torch.zeros_like(block).scatter(-1, place, block)
    sizes = is_new.sum(-1, dtype=torch.int32)
    return Plan(union, members, sizes, torch.where(once, pair, num_blocks * tile))


class KeyPlan(NamedTuple):
    """Of each key block the queries that picked it, ascending.

    ``queries`` int32 [B · G · tiles · P], the lists of all blocks end to end; ``bounds`` int64 [B, G, blocks, 4], where
    a block's list begins, where its queries begin and cease to see the whole block, and where it ends.
    """

    queries: Tensor
    bounds: Tensor


def key_plan(pairs: Tensor, tile: int, q_start: Tensor, q_end: Tensor, queries: int, block_size: int) -> KeyPlan:
    """From ``Plan.pairs`` and, for each key, the interval of queries that see it, [1 or B, S]."""
    batch, groups, tiles, _ = pairs.shape
    keys = q_start.shape[1]
    num_blocks = ceil_div(keys, block_size)
    device = pairs.device
    row = torch.arange(batch * groups, dtype=torch.int32, device=device).view(batch, groups)
    bucket = pairs // tile + (row * (num_blocks + 1))[..., None, None]
    query = pairs % tile + (torch.arange(tiles, dtype=torch.int32, device=device) * tile)[:, None]
    bucket, order = bucket.flatten().sort(stable=True)  # queries ascend in every tile, and tiles do
    query = query.flatten().index_select(0, order)

    first = torch.arange(0, keys, block_size, device=device)
    last = (first + (block_size - 1)).clamp(max=keys - 1)
    low, whole = q_start.index_select(1, first), q_start.index_select(1, last)
    high = torch.maximum(q_end.index_select(1, last), whole)
    cease = torch.minimum(torch.maximum(q_end.index_select(1, first), whole), high)
    wanted = torch.stack([low, whole, cease, high], -1)[:, None]
    # A list's place in the whole is that of its bucket; within, queries are told apart by one more digit.
    digit = max(queries, 1) + 1
    number = row[..., None] * (num_blocks + 1) + torch.arange(num_blocks, dtype=torch.int32, device=device)
    wanted = number.to(torch.int64)[..., None] * digit + wanted.clamp(max=queries)
    bounds = torch.searchsorted(bucket.to(torch.int64) * digit + query, wanted)
    return KeyPlan(query, bounds)
