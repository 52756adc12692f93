"""Pick key blocks in two steps: the best coarse groups first, then the best of their children."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.hierarchical_block_expansion import contract, select
from kernel_index.routing.hierarchical_block_expansion.native import native_select
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks, group_queries, legal_blocks

FEW_BLOCKS = "blocks ≤ coarse_topc × coarse_ratio: every block would be a candidate"
EVERYTHING_BEFORE = MaskContract()


class HierarchyPlan(NamedTuple):
    """What a selection looked at; every number is clamped to what exists.

    ``metas`` groups of ``coarse_ratio`` ``blocks``; ``coarse_topc`` of them are expanded into ``candidates`` blocks.
    ``exhaustive`` where all blocks were scored at once, and ``reason`` why.  ``recall`` is the share of the exhaustive
    selection that was found, None unless asked for.

    >>> import torch, kernel_index as ki
    >>> ki.hierarchical_block_select(torch.ones(1, 8, 1, 4), torch.ones(1, 4, 1, 4), block_size=2).plan.reason
    'blocks ≤ coarse_topc × coarse_ratio: every block would be a candidate'
    """

    blocks: int
    metas: int
    coarse_ratio: int
    coarse_topc: int
    candidates: int
    final_topk: int
    forced: tuple[str, ...]
    exhaustive: bool
    reason: str
    recall: float | None = None


class BlockSelection(NamedTuple):
    """``indices`` int32 [B, T, K, k], ascending, −1 where ``valid`` (bool, the same shape) is False; and the plan.

    >>> import torch, kernel_index as ki
    >>> q, block_keys = torch.ones(1, 4, 1, 1), torch.ones(1, 2, 1, 1)
    >>> ki.hierarchical_block_select(q, block_keys, final_topk=2, block_size=2).indices[0, :, 0].tolist()
    [[0, -1], [0, -1], [0, 1], [0, 1]]
    """

    indices: Tensor
    valid: Tensor
    plan: HierarchyPlan


def hierarchical_block_select(
    q: Tensor,
    block_keys: Tensor,
    *,
    coarse_ratio: int = 8,
    coarse_topc: int = 16,
    final_topk: int = 8,
    mask: MaskContract = EVERYTHING_BEFORE,
    block_size: int,
    forced: tuple[str, ...] = ("current",),
    kv_len: int | None = None,
    recall: bool = False,
) -> BlockSelection:
    """Pick key blocks for every query: the best groups of blocks first, then the best blocks inside them.

    With ``q̄`` the mean query of a group of heads, and a query's legal blocks those that lie wholly before the block
    that holds it and have a key that the mask allows::

        meta[t, m] = q̄[t] · mean of block_keys[j] over the legal children j of group m,  j // coarse_ratio = m
        candidates = the legal children of the coarse_topc best groups
        selection  = the forced blocks, then the best candidates by q̄[t] · block_keys[j], final_topk in all

    Scores are float32; among equal ones the smallest index wins.  No token after a query has any influence on what it
    picks.  With ``coarse_topc`` groups or fewer the selection is the exhaustive one exactly.  No gradient.

    Args:
        q: [B, T, H, D], any floating dtype.
        block_keys: [B, blocks, K, D], what stands for each block, as by the mean of its keys; H is a multiple of K.
        coarse_ratio: children of a group.
        coarse_topc: groups that are expanded.
        final_topk: blocks for each query, the forced ones counted.
        mask: who may attend to whom; causal.
        block_size: tokens of a block.
        forced: blocks that are in whatever their score, of ``"current"`` (it holds the query), ``"sink"`` (the first
            legal one) and ``"local"`` (the one before the current).  Without ``"current"`` only the past is picked.
        kv_len: S, the number of keys.  By default that of the mask's documents, else T where T tokens make that many
            blocks, else ``blocks · block_size``.
        recall: compare with the exhaustive selection, which costs that selection and waits for the device.

    Returns:
        ``BlockSelection(indices, valid, plan)``.  A query with fewer legal blocks has −1 in its last places; one that
        may attend to nothing has them everywhere.

    Raises:
        TypeError: a tensor is not floating, or an option is of the wrong type.
        ValueError: shapes do not fit, an option is out of range, or the mask is not causal.

    Source: two-level selection as in HISA (arXiv 2603.28458) and MSA (arXiv 2606.13392).

    >>> import torch, kernel_index as ki
    >>> block_keys = torch.tensor([3.0, 9.0, 0.0, 1.0, 2.0, 2.0, 0.0, 0.0]).view(1, 8, 1, 1)
    >>> query = torch.ones(1, 1, 1, 1)  # at position 15, in block 7
    >>> picked = ki.hierarchical_block_select(
    ...     query, block_keys, coarse_ratio=2, coarse_topc=2, final_topk=3, block_size=2
    ... )
    >>> picked.indices.tolist(), picked.plan.candidates
    ([[[[0, 1, 7]]]], 4)
    """
    contract.check_tensors(q, block_keys)
    wanted = contract.check_options(coarse_ratio, coarse_topc, final_topk, block_size, forced, mask, recall)
    sizes = contract.sizes_of(q, block_keys, mask, block_size, kv_len)
    blocks = block_keys.shape[1]
    metas = -(-blocks // coarse_ratio)
    few = metas <= coarse_topc
    plan = HierarchyPlan(
        blocks=blocks,
        metas=metas,
        coarse_ratio=min(coarse_ratio, blocks),
        coarse_topc=min(coarse_topc, metas),
        candidates=min(coarse_topc * coarse_ratio, blocks),
        final_topk=min(final_topk, blocks),
        forced=wanted,
        exhaustive=few,
        reason=FEW_BLOCKS if few else "",
    )
    with torch.no_grad():
        chosen, share = _select(q, block_keys, mask, sizes, plan, block_size, final_topk, recall)
    return BlockSelection(chosen.indices, chosen.valid, plan._replace(recall=share))


def _select(
    q: Tensor,
    block_keys: Tensor,
    mask: MaskContract,
    sizes: Sizes,
    plan: HierarchyPlan,
    block_size: int,
    topk: int,
    recall: bool,
) -> tuple[TopBlocks, float | None]:
    blocks, groups = block_keys.shape[1:3]
    legal = legal_blocks(mask, sizes, block_size)
    queries = group_queries(q, groups)
    keys = block_keys.detach().to(queries.dtype)
    by_native = contract.native_why_not(q, block_keys) is None
    pick = (_native_picks if by_native else _picks)(queries, keys, legal, plan, topk)
    step = max(1, select.SCORES_AT_ONCE // max(1, q.shape[0] * groups * blocks))
    if torch.compiler.is_compiling() or step >= q.shape[1] or (by_native and not recall):
        at_once = [slice(None)]
    else:
        at_once = [slice(t, t + step) for t in range(0, q.shape[1], step)]
    parts, found, all_of_them = [], 0, 0
    for at in at_once:
        part = pick(at, plan.exhaustive)
        parts.append(part)
        if recall:
            best = part if plan.exhaustive else pick(at, True)
            same = (best.indices[..., None] == part.indices[..., None, :]).any(-1) & best.valid
            found, all_of_them = found + int(same.sum()), all_of_them + int(best.valid.sum())
    chosen = parts[0] if len(parts) == 1 else TopBlocks(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))
    share = (found / all_of_them if all_of_them else 1.0) if recall else None
    return chosen, share


def _picks(
    queries: Tensor, keys: Tensor, legal: LegalBlocks, plan: HierarchyPlan, topk: int
) -> Callable[[slice, bool], TopBlocks]:
    """What picks for some of the queries, in two steps or exhaustively."""
    forced = select.forced_blocks(legal, keys.shape[1], plan.forced)
    first, current = (x.to(torch.int64)[..., None] for x in legal)

    def pick(at: slice, exhaustive: bool) -> TopBlocks:
        chunk = select.Chunk(queries[:, at], first[:, at], current[:, at], forced[:, at])
        if exhaustive:
            return select.exhaustive(chunk, keys, topk)
        return select.expanded(chunk, keys, plan.coarse_ratio, plan.coarse_topc, topk)

    return pick


def _native_picks(
    queries: Tensor, keys: Tensor, legal: LegalBlocks, plan: HierarchyPlan, topk: int
) -> Callable[[slice, bool], TopBlocks]:
    def pick(at: slice, exhaustive: bool) -> TopBlocks:
        own, opened = LegalBlocks(*(x[:, at] for x in legal)), plan.metas if exhaustive else plan.coarse_topc
        return native_select(queries[:, at], keys, own, plan.forced, plan.coarse_ratio, opened, topk)

    return pick
