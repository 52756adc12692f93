"""Plans the list-driven kernels: each key block visits the list of queries that selected it and writes partial results.

It is for heads that select alone.  The plan is one stable sort of the selection, of static size, and needs no wait for
the device.  No product is formed of a query and a block that it did not select.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.launch import (
    INTERPRETED_CONFIG,
    AttentionLaunch,
    Config,
    attention_launch,
    dot_block,
    interpreting,
)
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Cut

STEP = 64
"""Keys of a block at most: larger blocks are split into these, each with its own partial result."""

PART = 1024
"""Entries of a list that one program visits: a block that many queries selected is split among programs."""

PARTIAL_BYTES = 1 << 30
"""Bytes of partial results that exist at once, unless those of a single head are more."""

WASTE = 8
"""Lists are used from this ratio on: products of a tile's union over products of its selected blocks, at most."""


WIDEST = 256
"""Bytes of a head at most: the sums of dK and dV of a wider one do not fit into registers."""


def use_lists(cut: Cut, head_bytes: int, block_size: int, blocks: int, count: int) -> bool:
    """Depends on sizes alone: heads select alone, and a union can waste ``WASTE`` times the products."""
    if cut.group > 1 or head_bytes > WIDEST or (block_size > STEP and block_size % STEP):
        return False
    return min(cut.queries, blocks // max(1, count)) >= WASTE


def split(selected: Tensor, selected_valid: Tensor | None, block_size: int) -> tuple[Tensor, Tensor | None, int]:
    """The same selection in blocks of at most ``STEP`` keys."""
    ways = max(1, block_size // STEP)
    if ways == 1:
        return selected, selected_valid, block_size
    nth = torch.arange(ways, dtype=selected.dtype, device=selected.device)
    is_selected = selected >= 0 if selected_valid is None else selected_valid & (selected >= 0)
    finer = torch.where(is_selected[..., None], selected[..., None] * ways + nth, -1)
    return finer.flatten(-2), None, block_size // ways


class ListPlan(NamedTuple):
    """The queries of each key block as lists, and the parts of lists that programs visit.

    ``order`` [B · T · G · n], int32 if that suffices: indices ``((b·T + t)·G + g)·n + j`` into ``selected``, sorted by
    (b, g, block), ascending within a list.  ``items`` int64 [B · G, M, 4]: for each part its block, the begin of its
    list, its own begin and its end; the others are empty.  ``parts`` int32 [B · G, blocks + 1]: block j has the parts
    ``parts[j] ≤ i < parts[j + 1]``.
    """

    order: Tensor
    items: Tensor
    parts: Tensor


def list_plan(selected: Tensor, selected_valid: Tensor | None, num_blocks: int) -> ListPlan:
    batch, _, groups, _ = selected.shape
    lists, device = batch * groups, selected.device
    is_selected = (selected >= 0) & (selected < num_blocks)
    if selected_valid is not None:
        is_selected = is_selected & selected_valid
    of_list = torch.arange(lists, dtype=torch.int32, device=device).view(batch, 1, groups, 1) * (num_blocks + 1)
    bucket = torch.where(is_selected, selected.to(torch.int32), num_blocks) + of_list
    bucket, order = bucket.flatten().sort(stable=True)
    wanted = torch.arange(lists * (num_blocks + 1) + 1, dtype=torch.int32, device=device)
    begins = torch.searchsorted(bucket, wanted)
    first = begins[:-1].view(lists, -1)[:, :num_blocks]
    last = begins[1:].view(lists, -1)[:, :num_blocks]
    ends = ((last - first + (PART - 1)) // PART).cumsum(1)
    item = torch.arange(_items(selected, num_blocks), device=device).expand(lists, -1).contiguous()
    block = torch.searchsorted(ends, item, right=True)
    exists, block = block < num_blocks, block.clamp(max=max(0, num_blocks - 1))
    parts = torch.nn.functional.pad(ends, (1, 0))
    begin = first.gather(1, block)
    start = begin + (item - parts.gather(1, block)) * PART
    stop = torch.minimum(start + PART, last.gather(1, block))
    items = torch.stack([block, begin, start, torch.where(exists, stop, start)], -1)
    return ListPlan(order.to(_index_dtype(selected)), items, parts.to(torch.int32))


def allocate_list_plan(selected: Tensor, selected_valid: Tensor | None, num_blocks: int) -> ListPlan:
    batch, _, groups, _ = selected.shape
    return ListPlan(
        selected.new_empty(selected.numel(), dtype=_index_dtype(selected)),
        selected.new_empty((batch * groups, _items(selected, num_blocks), 4), dtype=torch.int64),
        selected.new_empty((batch * groups, num_blocks + 1), dtype=torch.int32),
    )


def _items(selected: Tensor, num_blocks: int) -> int:
    return num_blocks + selected.shape[1] * selected.shape[3] // PART


def _index_dtype(selected: Tensor) -> torch.dtype:
    return torch.int32 if selected.numel() < 2**31 else torch.int64


def pick_config(kernel: str, width: int, element_bytes: int, target: Target) -> Config:
    """The geometry for ``forward`` or ``backward``; a tile is a block of keys, a step are entries of its list.

    On an H100 the fastest of those tried, at 128 columns.
    """
    if interpreting():
        return INTERPRETED_CONFIG
    forward = kernel == "forward"
    if element_bytes == 4:
        return Config(STEP, 32 if forward else 16, 8, 2)
    if target.kind == "hip":
        return Config(STEP, 32, 4, 1)
    if forward:
        return Config(STEP, 128 if target.arch == 90 else 64, 4, 2)
    return Config(STEP, 32, 8 if target.arch == 120 and width > 64 else 4, 2)


def launch_of(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float | None, softcap: float
) -> AttentionLaunch:
    config = pick_config(kernel, max(q.shape[3], v.shape[3]), q.element_size(), target_of(q.device))
    config = config._replace(tile=dot_block(block_size))
    return attention_launch(config, q, v, scale, softcap, BM=config.step, BN=config.tile, BLOCK=block_size)


def heads_at_once(bytes_of_head: int, heads: int, kv_heads: int, batch: int) -> int:
    """How many of the batch's query heads one launch treats: whole groups of a KV head, or a divisor of one group."""
    group, most = heads // kv_heads, max(1, PARTIAL_BYTES // max(1, bytes_of_head))
    if most < group:
        return max(n for n in range(1, most + 1) if group % n == 0)
    return min(batch * kv_heads, most // group) * group


def parts_of(total: int, at_once: int) -> list[tuple[int, int]]:
    """(first, how many) of each launch."""
    return [(first, min(at_once, total - first)) for first in range(0, total, at_once)]
