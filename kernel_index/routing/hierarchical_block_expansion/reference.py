"""The specification of the two-step selection: every score, the mean score of each group, and two sorts."""

import math

import torch
from torch import Tensor

from kernel_index.routing.forced_blocks import forced_blocks
from kernel_index.routing.hierarchical_block_expansion.contract import HierarchyCall
from kernel_index.routing.legal_blocks import TopBlocks, ascending
from kernel_index.routing.membership import membership
from kernel_index.routing.stable_topk import best_by_sorting

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores."""


def select_reference(call: HierarchyCall) -> TopBlocks:
    with torch.no_grad():
        queries, keys, legal = call.operands()
        blocks = keys.shape[1]
        block = torch.arange(blocks, device=keys.device)
        forced = membership(forced_blocks(legal, blocks, call.plan.forced), None, blocks)  # [B or 1, T, 1, blocks]

        def select(at: slice) -> TopBlocks:
            scores = torch.einsum("btkd,bnkd->btkn", queries[:, at], keys)
            first, current = (x[:, at, None, None] for x in legal)
            candidates = (block >= first) & (block < current)
            if not call.plan.exhaustive:
                candidates = candidates & _in_best_groups(scores, candidates, call)
            best = best_by_sorting(scores, candidates + 2 * forced[:, at], call.topk)
            return ascending(best, call.topk)

        step = max(1, SCORES_AT_ONCE // max(1, math.prod(keys.shape[:3])))
        if torch.compiler.is_compiling() or step >= queries.shape[1]:
            return select(slice(None))
        chunks = [select(slice(t, t + step)) for t in range(0, queries.shape[1], step)]
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*chunks, strict=True)))


def _in_best_groups(scores: Tensor, legal: Tensor, call: HierarchyCall) -> Tensor:
    """Which blocks are children of the best groups, bool [B, T, K, blocks].

    The score of a group, that of the mean of its legal children, is the mean of their scores.
    """
    blocks, ratio, groups = scores.shape[3], call.plan.coarse_ratio, call.plan.metas
    padding = (0, groups * ratio - blocks)
    children = torch.nn.functional.pad(torch.where(legal, scores, 0.0), padding).unflatten(3, (groups, ratio))
    counted = torch.nn.functional.pad(legal, padding).unflatten(3, (groups, ratio)).sum(4)
    means = children.sum(4) / counted.clamp(min=1)
    opened = membership(best_by_sorting(means, counted > 0, call.plan.coarse_topc), None, groups)
    return opened.index_select(3, torch.arange(blocks, device=opened.device) // ratio)
