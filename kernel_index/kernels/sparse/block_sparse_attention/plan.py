"""Plans the union-driven kernels from a selection: static sizes, and no wait for the device.

``forward_plan`` sorts the selected blocks of each tile; ``key_plan``, which only a backward pass needs, sorts all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.triton.launch import ceil_div

WASTE = 3
"""Where lists are an alternative, a tile goes by its union up to so many products for one that is wanted."""


class Plan(NamedTuple):
    """The union of the blocks that each tile of queries selected, ascending; P = tile · n entries at most.

    ``blocks`` int32 [B, G, tiles, P], of which the first ``sizes`` [B, G, tiles] are valid; ``members`` int64, the same
    shape: bit q is set where query q of the tile selected that block.  ``pairs`` int32, the same shape: the tile's
    selection as ``block · tile + query``, ascending, with ``num_blocks · tile`` for invalid and repeated entries.
    """

    blocks: Tensor
    members: Tensor
    sizes: Tensor
    pairs: Tensor


def forward_plan(selected: Tensor, selected_valid: Tensor | None, num_blocks: int, tile: int) -> Plan:
    """``selected`` [B, T, G, n]; ``tile`` queries, a power of two up to 64, share a union."""
    batch, queries, groups, count = selected.shape
    tiles, entries = ceil_div(queries, tile), tile * count
    is_selected = (selected >= 0) & (selected < num_blocks)
    if selected_valid is not None:
        is_selected = is_selected & selected_valid
    block = torch.where(is_selected, selected.to(torch.int32), num_blocks)
    block = torch.nn.functional.pad(block, (0, 0, 0, 0, 0, tiles * tile - queries), value=num_blocks)
    query = torch.arange(tile, dtype=torch.int32, device=selected.device)[:, None, None]
    pair = block.view(batch, tiles, tile, groups, count) * tile
    pair = torch.where(pair < num_blocks * tile, pair + query, pair)
    pair = pair.permute(0, 3, 1, 2, 4).reshape(batch, groups, tiles, entries).sort(-1).values
    before = torch.nn.functional.pad(pair[..., :-1], (1, 0), value=-1)
    block, is_selected = pair // tile, pair < num_blocks * tile
    is_new = is_selected & (block != before // tile)
    once = is_selected & (pair != before)
    # Invalid entries write to the last slot, which is free if there is an invalid entry.
    slot = torch.where(is_selected, is_new.cumsum(-1) - 1, entries - 1)
    bit = torch.where(once, 1 << (pair % tile).to(torch.int64), 0)
    members = torch.zeros_like(bit).scatter_add(-1, slot, bit)
    union = torch.zeros_like(block).scatter(-1, slot, block)
    sizes = is_new.sum(-1, dtype=torch.int32)
    return Plan(union, members, sizes, torch.where(once, pair, num_blocks * tile))


def allocate_plan(selected: Tensor, tile: int) -> Plan:
    batch, queries, groups, count = selected.shape
    shape = (batch, groups, ceil_div(queries, tile), tile * count)
    blocks, pairs = (torch.empty(shape, dtype=torch.int32, device=selected.device) for _ in range(2))
    return Plan(blocks, blocks.new_empty(shape, dtype=torch.int64), blocks.new_empty(shape[:3]), pairs)


class KeyPlan(NamedTuple):
    """The selection inverted (CSR to CSC): the queries that selected each key block, ascending.

    ``queries`` int32 [B · G · tiles · P], the lists of all blocks one after the other; ``bounds`` int64
    [B, G, blocks, 4]: the begin of a block's list, the first query that sees the whole block, the first after those,
    and the end of the list.
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
    bucket, order = bucket.flatten().sort(stable=True)  # queries ascend within a tile, and tiles ascend
    query = query.flatten().index_select(0, order)

    first = torch.arange(0, keys, block_size, device=device)
    last = (first + (block_size - 1)).clamp(max=keys - 1)
    low, whole = q_start.index_select(1, first), q_start.index_select(1, last)
    high = torch.maximum(q_end.index_select(1, last), whole)
    cease = torch.minimum(torch.maximum(q_end.index_select(1, first), whole), high)
    wanted = torch.stack([low, whole, cease, high], -1)[:, None]
    # One sorted key holds the bucket and, as its lower digit, the query.
    digit = max(queries, 1) + 1
    number = row[..., None] * (num_blocks + 1) + torch.arange(num_blocks, dtype=torch.int32, device=device)
    wanted = number.to(torch.int64)[..., None] * digit + wanted.clamp(max=queries)
    bounds = torch.searchsorted(bucket.to(torch.int64) * digit + query, wanted)
    return KeyPlan(query, bounds)
