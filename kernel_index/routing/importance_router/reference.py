"""The specification of the router by importance: every weight, and a sort."""

import torch

from kernel_index.routing.importance_router.contract import ImportanceCall
from kernel_index.routing.importance_router.importances import importances
from kernel_index.routing.legal_blocks import TopBlocks, ascending
from kernel_index.routing.membership import membership
from kernel_index.routing.stable_topk import best_by_sorting

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores."""


def route_reference(call: ImportanceCall) -> TopBlocks:
    with torch.no_grad():
        (first, current), forced = call.legal_and_forced()
        (batch, queries, heads, _), blocks = call.q.shape, call.blocks
        block = torch.arange(blocks, device=call.q.device)
        is_forced = membership(forced, None, blocks)  # [rows, T, 1, blocks]

        def select(at: slice) -> TopBlocks:
            scores = importances(call, at)
            scores = torch.nn.functional.pad(scores, (0, blocks - scores.shape[-1]))  # the block that is still growing
            routable = (block >= first[:, at, None, None]) & (block < current[:, at, None, None])
            routable = routable & (block < call.block_keys.shape[1])
            best = best_by_sorting(scores, torch.where(is_forced[:, at], 2, routable.to(torch.int64)), call.selected)
            return ascending(best, call.selected)

        step = max(1, SCORES_AT_ONCE // max(1, batch * heads * blocks))
        if torch.compiler.is_compiling() or step >= queries:
            return select(slice(None))
        chunks = [select(slice(t, t + step)) for t in range(0, queries, step)]
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*chunks, strict=True)))
