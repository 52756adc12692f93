"""Which key blocks a query may be routed to, the mean key of a block, and the selection of the best blocks.

Every router of the family uses these functions, so that all of them agree on what is legal, on the mean of a block, and
on ties.  Block j holds the keys ``[j·block_size, (j + 1)·block_size)``; the last one may be shorter.  Nothing here has
a gradient, and nothing waits for a device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import Sizes, segments
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.topk_keys import FORCED, NOTHING, best_keys, index_of, pack


class LegalBlocks(NamedTuple):
    """The blocks ``first ≤ j < current`` are routable; ``current`` is in every selection.  int32 [rows, T].

    ``rows`` is 1 where all rows of the batch are alike.  A query that attends to nothing has ``current = −1``.  A query
    at a position after the last block has ``current = blocks``, which is no block: all of its blocks are past.
    """

    first: Tensor
    current: Tensor


class TopBlocks(NamedTuple):
    """``indices`` int32 [B, T, G, k], ascending, −1 where ``valid`` (bool, the same shape) is False."""

    indices: Tensor
    valid: Tensor


def num_blocks(keys: int, block_size: int) -> int:
    """Blocks that hold ``keys`` keys."""
    return -(-keys // block_size)


def without_empty_end(block_size: int, keys: int) -> int:
    """A shorter size where one block holds all keys: backends fill a block up to its size, or step through all of it.

    The first 1024 are kept, so that a trace of a usual size does not depend on the number of keys.
    """
    usual = 1024
    if block_size <= usual or block_size <= keys:
        return block_size
    return min(block_size, num_blocks(max(keys, 1), usual) * usual)


def check_causal(mask: MaskContract) -> None:
    """Routers select past blocks only, so a contract that allows the future has no routed form."""
    if not mask.causal or mask.prefix is not None:
        got = "causal=False" if not mask.causal else f"prefix={mask.prefix}"
        raise ValueError(f"mask must be causal: a router takes past blocks and the current one, got {got}")
    if isinstance(mask.q_offset, Tensor):
        raise ValueError("q_offset must be one number for all rows where blocks are routed, got one for each row")
    if mask.cu_seqlens is not None and mask.cu_seqlens[1] is not None:
        raise ValueError("cu_seqlens must be one list where blocks are routed, got two")
    if mask.key_validity is not None:
        raise ValueError(
            "key_validity must be left out where blocks are routed: a query behind the keys has no current block; "
            "validity counts queries and keys, got counts of keys alone"
        )


def legal_blocks(mask: MaskContract, sizes: Sizes, block_size: int) -> LegalBlocks:
    """The routable blocks of every query.

    A block is routable if it lies wholly before the query's current block and holds a key that the query may attend to:
    one of its document, inside its window and the valid prefix.  These blocks are one range.  The current block, which
    holds the query, is always selected; the token mask excludes its future keys.

    Args:
        mask: a causal contract.
        sizes: ``mask.sizes(B, T, S, device)``.
        block_size: tokens of a block.

    Raises:
        ValueError: the contract is not causal.
    """
    check_causal(mask)

    def build() -> LegalBlocks:
        start, end = mask.row_intervals(sizes)
        position = mask.positions_of_queries(sizes).to(torch.int32)
        some = start < end
        first = torch.where(some, start // block_size, 0)
        current = (position // block_size).clamp(max=num_blocks(sizes.keys, block_size)).expand_as(start)
        return LegalBlocks(first, torch.where(some, current, -1))

    return mask.remember("legal_blocks", (sizes, block_size), build)


def block_means(k: Tensor, block_size: int, mask: MaskContract) -> Tensor:
    """The mean key of each block, by which it is scored: float32 [B, blocks, K, D].

    Where documents meet inside a block the mean is over the last of them alone: only queries of that document can have
    the block wholly in their past, so the other document's keys would be a leak.

    Args:
        k: [B, S, K, D].
        block_size: tokens of a block.
        mask: the contract of the call; only its documents matter here.
    """
    with torch.no_grad():
        k, dtype = k.detach(), torch.promote_types(k.dtype, torch.float32)
        keys = k.shape[1]
        blocks = num_blocks(keys, block_size)
        whole = keys // block_size
        docs = mask.document_rows(keys)
        if docs is None:
            # A GPU widens values as it adds them: no copy is made.
            means = [k[:, : whole * block_size].unflatten(1, (whole, block_size)).mean(2, dtype=dtype)]
            if whole < blocks:
                means.append(k[:, whole * block_size :].mean(1, keepdim=True, dtype=dtype))
            return torch.cat(means, 1)
        position = torch.arange(keys, device=k.device)
        last = ((position // block_size + 1) * block_size - 1).clamp(max=max(0, keys - 1))
        begin, _ = segments(docs)
        kept = position >= begin.index_select(1, last)  # in the document of the block's last key
        padding = (0, blocks * block_size - keys)
        counted = torch.nn.functional.pad(kept, padding).unflatten(1, (blocks, block_size)).sum(2)
        wide = torch.where(kept[..., None, None], k.to(dtype), 0.0)
        sums = torch.nn.functional.pad(wide, (0, 0, 0, 0, *padding)).unflatten(1, (blocks, block_size)).sum(2)
        return sums / counted[..., None, None]


def group_queries(q: Tensor, groups: int) -> Tensor:
    """One query for each group of heads, at least float32 [B, T, G, D]: their mean.

    Scores are linear in the query, so the mean of a group's scores is the score of its mean query.
    """
    with torch.no_grad():
        wide = torch.promote_types(q.dtype, torch.float32)
        heads = q.shape[2] // groups
        if heads == 1:
            return q.detach().to(wide)
        return q.detach().unflatten(2, (groups, heads)).sum(3, dtype=wide) / heads  # no wide copy of q


def top_blocks(scores: Tensor, legal: LegalBlocks, topk: int, *, first_block: int = 0) -> TopBlocks:
    """The current block and the ``topk − 1`` best routable ones; among equal scores the smallest index wins.

    Args:
        scores: float [B, T, G, n] of the blocks ``first_block … first_block + n − 1``; the scores of blocks that are
            not routable are not looked at.
        legal: of the same T queries.
        topk: blocks for each query, the current one counted.
        first_block: the block of the first column.

    Returns:
        ``TopBlocks`` with ``k = topk`` columns; a query with fewer legal blocks has −1 in its last ones.
    """
    with torch.no_grad():
        columns = scores.shape[-1]
        block = torch.arange(first_block, first_block + columns, device=scores.device)
        first, current = (x.to(torch.int64)[:, :, None, None] for x in legal)
        routable = (block >= first) & (block < current)
        keys = best_keys(scores, routable, block, min(topk, columns))
        here = (current >= first_block) & (current < first_block + columns)
        return best_blocks(keys, torch.where(here, current, -1), topk)


def best_blocks(keys: Tensor, forced: Tensor, topk: int) -> TopBlocks:
    """The forced blocks, then those of the best keys, ``topk`` in all.

    Args:
        keys: int64 [B, T, G, n] of ``topk_keys``, without the forced blocks.
        forced: int64, broadcastable to [B, T, G, F]; −1 for none.
        topk: blocks for each query.
    """
    forced = forced.expand(*keys.shape[:-1], -1)
    forced_keys = torch.where(forced >= 0, pack(torch.full_like(forced, FORCED), forced), NOTHING)
    keys = torch.cat([keys, forced_keys], -1)
    best = torch.topk(keys, min(topk, keys.shape[-1]), dim=-1, sorted=False).values
    return ascending(torch.where(best > NOTHING, index_of(best), -1), topk)


def ascending(indices: Tensor, topk: int) -> TopBlocks:
    """``TopBlocks`` of ``topk`` columns from block indices [..., n ≤ topk] in any order, −1 for none."""
    ordered = torch.where(indices >= 0, indices, _LAST).to(torch.int32).sort(-1).values
    ordered = torch.nn.functional.pad(ordered, (0, topk - ordered.shape[-1]), value=_LAST)
    valid = ordered < _LAST
    return TopBlocks(torch.where(valid, ordered, -1), valid)


_LAST = 2**31 - 1
