"""Which key blocks a query may be routed to, what stands for a block, and which of them are taken.

Every router of the family uses these functions, so that they agree on what is legal, on the mean of a block, and on
ties.  Block j holds the keys ``[j·block_size, (j + 1)·block_size)``; the last one may be shorter.  All of it is without
gradient, and nothing waits for a device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import Sizes, segments
from kernel_index.masks.doc_window_mask.mask import MaskContract


class LegalBlocks(NamedTuple):
    """The blocks ``first ≤ j < current`` are routable; ``current`` is in every selection.  int32 [rows, T].

    ``rows`` is 1 where all rows of the batch are alike.  A query that attends to nothing has ``current = −1``.  A query
    that stands behind the last block has ``current = blocks``, which is no block: all of its blocks are past.
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


def check_causal(mask: MaskContract) -> None:
    """Routers look at the past only, so a contract that allows the future has no routed form."""
    if not mask.causal:
        raise ValueError("mask must be causal: a router takes past blocks and the current one, got causal=False")


def legal_blocks(mask: MaskContract, sizes: Sizes, block_size: int) -> LegalBlocks:
    """The routable blocks of every query.

    A block is routable if it lies wholly before the query's own block and holds a key that the query may attend to:
    one of its document, inside its window and the valid prefix.  These blocks are one range.  The current block, which
    holds the query, is always in; what it holds of the future is left to the token mask.

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
        position = torch.arange(sizes.queries, dtype=torch.int32, device=sizes.device) + sizes.offset
        some = start < end
        first = torch.where(some, start // block_size, 0)
        current = (position // block_size).clamp(max=num_blocks(sizes.keys, block_size)).expand_as(start)
        return LegalBlocks(first, torch.where(some, current, -1))

    return mask.remember("legal_blocks", (sizes, block_size), build)


def block_means(k: Tensor, block_size: int, mask: MaskContract) -> Tensor:
    """What stands for each block when it is scored: the mean of its keys, float32 [B, blocks, K, D].

    Where documents meet inside a block the mean is over the last of them alone: only queries of that document can have
    the block wholly in their past, so the other document's keys would be a leak.

    Args:
        k: [B, S, K, D].
        block_size: tokens of a block.
        mask: the contract of the call; only its documents matter here.
    """
    with torch.no_grad():
        wide = k.detach().to(torch.promote_types(k.dtype, torch.float32))
        keys = wide.shape[1]
        blocks = num_blocks(keys, block_size)
        whole = keys // block_size
        docs = mask.doc_rows
        if docs is None:
            parts = [wide[:, : whole * block_size].unflatten(1, (whole, block_size)).mean(2)]
            if whole < blocks:
                parts.append(wide[:, whole * block_size :].mean(1, keepdim=True))
            return torch.cat(parts, 1)
        position = torch.arange(keys, device=k.device)
        last = ((position // block_size + 1) * block_size - 1).clamp(max=max(0, keys - 1))
        begin, _ = segments(docs)
        kept = position >= begin.index_select(1, last)  # in the document of the block's last key
        padding = (0, blocks * block_size - keys)
        counted = torch.nn.functional.pad(kept, padding).unflatten(1, (blocks, block_size)).sum(2)
        wide = torch.where(kept[..., None, None], wide, 0.0)
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
        scores: float [B, T, G, n] of the blocks ``first_block … first_block + n − 1``; what stands at blocks that are
            not routable is not looked at.
        legal: of the same T queries.
        topk: blocks for each query, the current one counted.
        first_block: the block of the first column.

    Returns:
        ``TopBlocks`` with ``k = topk`` columns; a query with fewer legal blocks has −1 in its last ones.
    """
    with torch.no_grad():
        chosen = _top_by_value(scores, legal, topk, first_block) if _may_look(scores) else None
        indices = _top_by_key(scores, legal, topk, first_block) if chosen is None else chosen
        indices = indices.sort(-1).values
        valid = indices < _NOWHERE
        indices = torch.where(valid, indices, -1)
        missing = topk - indices.shape[-1]
        if missing > 0:
            indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
            valid = torch.nn.functional.pad(valid, (0, missing), value=False)
        return TopBlocks(indices, valid)


def _may_look(scores: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a trace."""
    if torch.compiler.is_compiling() or scores.device.type != "cpu" or type(scores) is not Tensor:
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


def _top_by_value(scores: Tensor, legal: LegalBlocks, topk: int, first_block: int) -> Tensor | None:
    """The choice of ``_top_by_key`` from the scores themselves, 5 times faster, or None where a tie must be broken.

    One score more than needed is asked for: where it equals the last one taken, or where a NaN or an infinity makes the
    number of finite scores differ from that of the blocks that may be taken, the values alone do not decide.
    """
    columns = scores.shape[-1]
    kept = min(topk, columns)
    if columns == 0:
        return None
    block = torch.arange(first_block, first_block + columns, dtype=torch.int32, device=scores.device)
    first, current = (x[:, :, None, None] for x in legal)
    routable = (block >= first) & (block < current)
    open_ = scores.to(torch.float32) + routable.to(torch.float32).log()  # log 0 = −∞; faster than a select
    own = (current - first_block).clamp(0, columns - 1).to(torch.int64)
    here = (current >= first_block) & (current < first_block + columns)
    own = own.expand(*scores.shape[:3], 1)
    open_.scatter_(-1, own, torch.where(here, torch.inf, open_.gather(-1, own)))
    values, places = torch.topk(open_, min(kept + 1, columns), dim=-1)
    taken = values[..., :kept] > -torch.inf
    past = current.clamp(max=first_block + columns) - first.clamp(min=first_block)
    takeable = past.clamp(min=0) + here
    undecided = (taken.sum(-1, keepdim=True) != takeable.clamp(max=kept)).any()
    if kept < columns:
        undecided |= ((values[..., kept - 1] == values[..., kept]) & (values[..., kept] > -torch.inf)).any()
    if bool(undecided):
        return None
    return torch.where(taken, places[..., :kept] + first_block, _NOWHERE).to(torch.int32)


def _top_by_key(scores: Tensor, legal: LegalBlocks, topk: int, first_block: int) -> Tensor:
    """Indices in any order, ``_NOWHERE`` for none; ties are broken in the keys."""
    columns = scores.shape[-1]
    block = torch.arange(first_block, first_block + columns, dtype=torch.int32, device=scores.device)
    first, current = (x[:, :, None, None] for x in legal)
    keys = _ordered(scores, (block >= first) & (block < current), block == current)
    best, places = torch.topk(keys, min(topk, columns), dim=-1, sorted=False)
    return torch.where(best >= 0, places + first_block, _NOWHERE).to(torch.int32)


_NOWHERE = 2**31 - 1


def _ordered(scores: Tensor, routable: Tensor, forced: Tensor) -> Tensor:
    """Non-negative int64 keys that are all different: by score, then by smaller index; −1 where nothing may be taken.

    Two's complement turns float32 into an integer of the same order once the magnitude bits of negative numbers are
    flipped; −0.0 becomes 0.0 first, so that the two are a tie.  A forced block is above every score.
    """
    bits = (scores.to(torch.float32) + 0.0).view(torch.int32)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + 2**31
    rank = torch.where(forced, 2**32, rank)
    columns = scores.shape[-1]
    order = torch.arange(columns - 1, -1, -1, device=scores.device)
    return torch.where(routable | forced, rank * columns + order, -1)
