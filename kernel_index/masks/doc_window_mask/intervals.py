"""The canonical form of a mask: for each query the half-open interval of keys that it may attend to."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Intervals(NamedTuple):
    """Query t attends to the keys ``start[t] ≤ s < end[t]``; int32 [B, T], both non-decreasing along T."""

    start: Tensor
    end: Tensor


class RowBounds(NamedTuple):
    """Query t attends to key s iff ``start[t] ≤ s < end[t]`` and, in a tree, ``t < q_end[s]``.

    int32 [rows, T] and [rows, S]; ``q_end`` is None where the keys of every query are one interval.  A query without
    an allowed key has ``start == end``.
    """

    start: Tensor
    end: Tensor
    q_end: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "RowBounds":
        """The changed bounds."""
        return RowBounds(change(self.start), change(self.end), None if self.q_end is None else change(self.q_end))

    def allowed(self, queries: slice, keys: Tensor) -> Tensor:
        """Which of the keys [n] these queries may attend to, bool [rows, queries, n]."""
        start, end = (bound[:, queries, None] for bound in self[:2])
        seen = (keys >= start) & (keys < end)
        if self.q_end is None:
            return seen
        query = torch.arange(self.start.shape[1], device=start.device, dtype=torch.int32)[queries, None]
        return seen & (query < self.q_end.index_select(1, keys)[:, None])

    def all_allowed(self, queries: slice, keys: int) -> Tensor:
        """The same for all of the S keys, bool [rows, queries, S]."""
        return self.allowed(queries, torch.arange(keys, device=self.start.device, dtype=torch.int32))


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
    """The sizes of one call: B, rows of the mask's tensors (1 if all rows are alike), T, S, offset and device.

    ``offset`` is the position of query 0 among the keys; None where rows or documents have offsets of their own.
    """

    batch: int
    rows: int
    queries: int
    keys: int
    offset: int | None
    device: torch.device

    @property
    def one_offset(self) -> int:
        """The offset of every row, where the caller has made sure that there is one."""
        assert self.offset is not None
        return self.offset


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


class Documents(NamedTuple):
    """The document of each query: its keys ``low ≤ s < high``, and whether the query is ``outside`` of the keys.

    int64 and bool, [rows, n] or [1, n]; both bounds never decrease.
    """

    low: Tensor
    high: Tensor
    outside: Tensor


def documents_of_ids(doc_ids: Tensor, position: Tensor, keys: int) -> Documents:
    """From ids [rows, S] and the positions [rows or 1, n] of queries among the keys."""
    at = position.clamp(0, keys - 1)
    if position.shape[0] == 1:
        low, high, padding = (x.index_select(1, at[0]) for x in (*segments(doc_ids), doc_ids < 0))
    else:
        low, high, padding = (x.expand(at.shape[0], -1).gather(1, at) for x in (*segments(doc_ids), doc_ids < 0))
    return Documents(low, torch.where(padding, low, high), (position < 0) | (position >= keys))


def interval_of(
    queries: Tensor,
    position: Tensor,
    sizes: Sizes,
    window: tuple[int | None, int | None],
    documents: Documents | None,
    counts: Tensor | None,
    key_counts: Tensor | None = None,
    prefix: int | Tensor | None = None,
) -> Intervals:
    """The intervals of queries [n] at ``position`` [rows or 1, n], int64 [rows, n], in O(n), without a wait.

    ``low`` and ``high`` bound the keys of the query's document and valid prefix.  They and the sides of the window
    never decrease from one query to the next, and an empty interval is placed at ``end``: so both results are
    non-decreasing.
    """
    # The same formula for JAX arrays is interval_of in jax/mask_bounds.py; tests/jax/test_mask.py compares the two.
    left, right = window
    keys = sizes.keys
    low, high = torch.zeros_like(position), torch.full_like(position, keys)
    outside, valid_end = None, torch.full_like(position, keys)
    if documents is not None:
        low, high, outside = documents
    document_low = low
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
    if sizes.offset is None and documents is not None:
        # Under two lists of lengths a query may stand before its document: its interval is empty, at the start of it.
        end = torch.maximum(end, torch.minimum(low, high))
    start = low if left is None else torch.maximum(low, position - left)
    if prefix is not None:
        tokens = prefix.clamp(0, keys)[:, None] if isinstance(prefix, Tensor) else min(prefix, keys)
        prefix_end = document_low + tokens
        inside = (position >= document_low) & (position < prefix_end)
        start = torch.where(inside, low, start)
        end = torch.where(inside, torch.maximum(end, torch.minimum(high, prefix_end)), end)
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
