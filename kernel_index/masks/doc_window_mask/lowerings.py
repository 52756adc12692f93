"""The forms of a mask that kernels take, each made from its intervals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import BlockPlan, Documents, Intervals, RowBounds, Sizes, segments
from kernel_index.masks.prefix_tree.tiles import Tiles, lists_of

VARLEN_NEEDS_SQUARE = "documents and prefixes have packed lengths only where T = S and query 0 is at key 0"
VARLEN_NEEDS_ONE_PREFIX = "packed lengths for keys with a valid prefix of their own are not made"
VARLEN_NEEDS_ONE_LIST = "packed lengths of queries that differ from those of the keys are not made"
VARLEN_NEEDS_CAUSALITY = "packed lengths have no prefix that is seen in both directions"
VARLEN_NEEDS_BOTTOM_RIGHT = "packed lengths align the last query with the last key, and this offset does not"


class KernelIntervals(NamedTuple):
    """Intervals for queries and for keys; int32, one row where all rows are alike.

    Query t attends to the keys ``k_start[t] ≤ s < k_end[t]`` [B, T]; the queries ``q_start[s] ≤ t < q_end[s]`` [B, S]
    attend to key s.  All four are non-decreasing.  In a tree both conditions must hold, and the bounds may decrease.
    """

    k_start: Tensor
    k_end: Tensor
    q_start: Tensor
    q_end: Tensor


class SegmentIds(NamedTuple):
    """int32 [B, T] and [B, S]: equal where a query and a key are valid and in the same document.

    Padding is −1 among the queries and −2 among the keys, so it equals no other id.  Causality and the window are not
    included: a kernel applies them itself.
    """

    q: Tensor
    kv: Tensor


class Varlen(NamedTuple):
    """Packed sequences for kernels that take cumulative lengths.

    The tokens of all rows are concatenated; padding belongs to no sequence.  ``kept`` are the indices of the other
    tokens (int64, ascending; None if all are kept), and ``cu_seqlens_q`` and ``cu_seqlens_k``, int32 [n + 1], count the
    kept tokens.  ``window`` is ``(left, right)`` with −1 for unlimited and right = 0 where causal, aligned bottom-right
    within each sequence.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    kept: Tensor | None
    window: tuple[int, int]


def transposed(bounds: Intervals, keys: int) -> Intervals:
    """For each key the interval of queries that attend to it, by two binary searches: both bounds never decrease."""
    key = torch.arange(keys, device=bounds.start.device, dtype=torch.int32).expand(bounds.start.shape[0], -1)
    key = key.contiguous()
    first = torch.searchsorted(bounds.end.contiguous(), key, right=True, out_int32=True)
    last = torch.searchsorted(bounds.start.contiguous(), key, right=True, out_int32=True)
    return Intervals(first, last)


def mask_mod(bounds: RowBounds) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's predicate over the bounds [B, T]."""
    start, end, q_end = bounds

    def allowed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        inside = (kv_idx >= start[b, q_idx]) & (kv_idx < end[b, q_idx])
        return inside if q_end is None else inside & (q_idx < q_end[b, kv_idx])

    return allowed


def tiles_of_plan(plan: BlockPlan, sizes: Sizes, blocks: tuple[int, int]) -> Tiles:
    """The partial and the full blocks of a plan: they are ranges, so no predicate is evaluated.

    A block of queries that ends after the last query has no full blocks, as in ``create_block_mask``.
    """
    first, last, first_full, last_full = (bound[..., None] for bound in plan)
    if sizes.queries % blocks[0]:
        ragged = torch.arange(first.shape[1], device=first.device)[:, None] == first.shape[1] - 1
        last_full = torch.where(ragged, first_full, last_full)
    column = torch.arange(-(-sizes.keys // blocks[1]), device=first.device, dtype=torch.int32)
    full = (column >= first_full) & (column < last_full)
    return Tiles((column >= first) & (column < last) & ~full, full)


def flex_block_mask(tiles: Tiles, bounds: RowBounds, sizes: Sizes, blocks: tuple[int, int]) -> Any:
    """FlexAttention's BlockMask: lists of the partial and of the full blocks, by query and by key.

    ``BlockMask.from_kv_blocks`` would sort to find the lists by key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    named: dict[str, Any] = {}
    for prefix, chosen in (("", tiles.partial), ("full_", tiles.full)):
        for side, of_side in (("kv", chosen), ("q", chosen.transpose(1, 2))):
            counts, indices = (x.expand(sizes.batch, *x.shape[1:])[:, None].contiguous() for x in lists_of(of_side))
            named |= {f"{prefix}{side}_num_blocks": counts, f"{prefix}{side}_indices": indices}
    return BlockMask(seq_lengths=(sizes.queries, sizes.keys), **named, BLOCK_SIZE=blocks, mask_mod=mask_mod(bounds))


def segment_ids(
    sizes: Sizes,
    position: Tensor,
    documents: Documents | None,
    doc_ids: Tensor | None,
    counts: Tensor | None,
    key_counts: Tensor | None = None,
) -> SegmentIds:
    """The id of a segment is the position of its first token; without documents all tokens have id 0.

    ``position`` [rows or 1, T] and ``documents`` are those of the queries, ``doc_ids`` [rows, S] those of the keys.
    """
    key, query = torch.arange(sizes.keys, device=sizes.device), torch.arange(sizes.queries, device=sizes.device)
    of_keys, of_queries = torch.zeros_like(key)[None], torch.zeros_like(position)
    if doc_ids is not None:
        of_keys = torch.where(doc_ids >= 0, segments(doc_ids)[0], -2)
        of_queries = of_queries - 1
    if documents is not None:
        low, high, outside = documents
        of_queries = torch.where(outside | (high <= low), -1, low)
    valid_keys = counts if key_counts is None else key_counts
    if valid_keys is not None:
        of_keys = torch.where(key < valid_keys[:, None], of_keys, -2)
    if counts is not None:
        limit = counts[:, None]
        valid = (position >= 0) & (position < limit) if key_counts is None else query < limit
        of_queries = torch.where(valid, of_queries, -1)
    return SegmentIds(*(x.to(torch.int32).expand(sizes.batch, -1).contiguous() for x in (of_queries, of_keys)))


def varlen_why_not(sizes: Sizes, has_documents: bool, has_key_counts: bool = False) -> str | None:
    """Why packed sequences cannot express the mask, or None."""
    if has_key_counts:
        return VARLEN_NEEDS_ONE_PREFIX
    if has_documents:
        return None if sizes.queries == sizes.keys and sizes.offset == 0 else VARLEN_NEEDS_SQUARE
    return None if sizes.offset == sizes.keys - sizes.queries else VARLEN_NEEDS_BOTTOM_RIGHT


def varlen(sizes: Sizes, bounds: tuple[int | None, int | None], ids: Tensor | None) -> Varlen:
    """Cumulative lengths from the segment ids of the keys, or one sequence for each row where ``ids`` is None."""
    left, right = bounds
    window = (-1 if left is None else left, -1 if right is None else right)
    if ids is None:
        rows = torch.arange(sizes.batch + 1, device=sizes.device, dtype=torch.int32)
        return Varlen(rows * sizes.queries, rows * sizes.keys, sizes.queries, sizes.keys, None, window)
    row = torch.arange(sizes.batch, device=sizes.device)[:, None]
    flat = torch.where(ids >= 0, row * sizes.keys + ids, -1).reshape(-1)  # a different id for each segment of the batch
    kept = torch.nonzero(flat >= 0).flatten()
    of_kept = flat[kept]
    is_new = torch.ones_like(of_kept, dtype=torch.bool)
    is_new[1:] = of_kept[1:] != of_kept[:-1]
    starts = torch.nonzero(is_new).flatten()
    ends = torch.full((1,), kept.shape[0], dtype=torch.int64, device=sizes.device)
    lengths = torch.cat([starts, ends])
    longest = int(lengths.diff().max()) if starts.shape[0] else 0
    cumulative = lengths.to(torch.int32) if starts.shape[0] else ends.to(torch.int32)
    everything = kept.shape[0] == flat.shape[0]
    return Varlen(cumulative, cumulative, longest, longest, None if everything else kept, window)
