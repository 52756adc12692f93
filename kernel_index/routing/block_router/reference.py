"""The specification of the exhaustive router: every score, sorted."""

import torch

from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.block_router.scores import block_scores, means_and_legal
from kernel_index.routing.legal_blocks import TopBlocks, ascending
from kernel_index.routing.stable_topk import best_by_sorting

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores."""


def route_reference(call: RouterCall) -> TopBlocks:
    with torch.no_grad():
        means, legal = means_and_legal(call)
        block = torch.arange(call.blocks, device=call.q.device)

        def select(at: slice) -> TopBlocks:
            scores = block_scores(call.q[:, at], means, call.groups)  # [B, T, G, blocks]
            first, current = (x[:, at, None, None] for x in legal)
            routable, is_current = (block >= first) & (block < current), block == current
            best = best_by_sorting(scores, routable + 2 * is_current, call.selected)
            return ascending(best, call.selected)

        batch, queries = call.q.shape[:2]
        scores = batch * queries * call.groups * call.blocks
        if torch.compiler.is_compiling() or scores <= SCORES_AT_ONCE:
            return select(slice(None))
        step = max(1, SCORES_AT_ONCE // (batch * call.groups * call.blocks))
        chunks = [select(slice(t, t + step)) for t in range(0, queries, step)]
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*chunks, strict=True)))
