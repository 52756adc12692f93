"""The canonical form of a mask: for each query the half-open interval of keys that it may attend to."""

from typing import NamedTuple

import torch
from torch import Tensor


class Intervals(NamedTuple):
    """Query t attends to the keys ``start[t] ≤ s < end[t]``; int32 [B, T], both non-decreasing along T."""

    start: Tensor
    end: Tensor


class BlockPlan(NamedTuple):
    """For each block of queries, the blocks of keys to visit; int32 [B, ceil(T / q_block)].

    Visit the key blocks ``first ≤ j < last``: no other block holds an allowed key, and each of these holds one if every
    query of the block has an allowed key.  Blocks with ``first_full ≤ j < last_full`` need no mask: all their keys
    exist and are allowed for all queries of the block.  ``first ≤ first_full ≤ last_full ≤ last`` always holds.
    """

    first: Tensor
    last: Tensor
    first_full: Tensor
    last_full: Tensor


class Sizes(NamedTuple):
    """The sizes of one call: B, rows of the mask's tensors (1 if all rows are alike), T, S, offset and device."""

    batch: int
    rows: int
    queries: int
    keys: int
    offset: int
    device: torch.device


def segments(doc_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First position and end of the maximal run of equal ids around each position; int64, the shape of ``doc_ids``.

    Adjacent negative ids, the padding, form one run even if they differ.
    """
    rows, keys = doc_ids.shape
    doc_ids = doc_ids.to(torch.int64).clamp(min=-1)
    position = torch.arange(keys, device=doc_ids.device)
    # Nothing is written in place: under vmap the ids may be batched where a new tensor is not.
    first = torch.ones(rows, min(keys, 1), dtype=torch.bool, device=doc_ids.device)
    is_new = torch.cat((first, doc_ids[:, 1:] != doc_ids[:, :-1]), 1)
    start = torch.where(is_new, position, 0).cummax(-1).values
    last = torch.full((rows, 1), keys, device=doc_ids.device)
    next_start = torch.cat((torch.where(is_new, position, keys), last), 1)
    end = next_start.flip(-1).cummin(-1).values.flip(-1)[:, 1:]
    return start, end


def interval_of(
    queries: Tensor,
    sizes: Sizes,
    window: tuple[int | None, int | None],
    doc_ids: Tensor | None,
    counts: Tensor | None,
    key_counts: Tensor | None = None,
) -> Intervals:
    """The intervals of the given queries, int64 [rows, n], in O(n + S) and without waiting for a device.

    ``low`` and ``high`` bound the keys of the query's segment and valid prefix.  They and the sides of the window never
    decrease from one query to the next, and an empty interval is placed at ``end``: so both results are non-decreasing.
    """
    # The same formula for JAX arrays is MaskContract.bounds_of in jax/mask.py; tests/jax/test_mask.py compares the two.
    left, right = window
    keys = sizes.keys
    position = (queries + sizes.offset)[None]  # of each query among the keys
    low, high = torch.zeros_like(position), torch.full_like(position, keys)
    outside, valid_end = None, torch.full_like(position, keys)
    if doc_ids is not None and keys > 0:
        at = position[0].clamp(0, keys - 1)
        low, high = (bound.index_select(1, at) for bound in segments(doc_ids))
        padding = (doc_ids < 0).index_select(1, at)
        high = torch.where(padding, low, high)
        outside = (position < 0) | (position >= keys)
    of_keys = counts if key_counts is None else key_counts
    if of_keys is not None:
        limit = of_keys[:, None]
        high, valid_end = torch.minimum(high, limit), torch.minimum(valid_end, limit)
    if counts is not None:
        limit = counts[:, None]
        beyond = (position < 0) | (position >= limit) if key_counts is None else queries[None] >= limit
        outside = beyond if outside is None else outside | beyond
    if outside is not None:
        # An empty interval is at 0 for a query before the first key, at the end of the valid keys for one after them.
        empty = torch.where(position < 0, 0, valid_end)
        low, high = torch.where(outside, empty, low), torch.where(outside, empty, high)
    end = high if right is None else torch.minimum(high, position + (right + 1))
    end = end.clamp(min=0)
    start = low if left is None else torch.maximum(low, position - left)
    shape = (sizes.rows, queries.shape[0])
    return Intervals(torch.minimum(start, end).expand(shape), end.expand(shape))


def plan_blocks(bounds: Intervals, at_first: Tensor, at_last: Tensor, kv_block: int) -> BlockPlan:
    """The plan from the intervals of each block's first and last query, which bound those of the others."""
    start_low, end_low = (bound.index_select(1, at_first) for bound in bounds)
    start_high, end_high = (bound.index_select(1, at_last) for bound in bounds)
    first = start_low // kv_block
    last = torch.where(end_high > start_low, -(-end_high // kv_block), first)
    first_full = torch.minimum(torch.maximum(-(-start_high // kv_block), first), last)
    last_full = torch.minimum(torch.maximum(end_low // kv_block, first_full), last)
    return BlockPlan(*(bound.to(torch.int32) for bound in (first, last, first_full, last_full)))
