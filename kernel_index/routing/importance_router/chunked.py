"""The router by importance in PyTorch, one chunk of queries at a time, on any device."""

import torch

from kernel_index.routing.importance_router.contract import ImportanceCall
from kernel_index.routing.importance_router.importances import importances
from kernel_index.routing.legal_blocks import TopBlocks, best_blocks
from kernel_index.routing.topk_keys import best_keys

SCORES_AT_ONCE = 1 << 22
"""Queries are taken in chunks of at most this many scores of single heads."""


def route_chunked(call: ImportanceCall) -> TopBlocks:
    with torch.no_grad():
        legal, forced = call.legal_and_forced()
        first, current = (x.to(torch.int64)[:, :, None, None] for x in legal)
        (batch, queries, heads, _), blocks = call.q.shape, call.block_keys.shape[1]
        block = torch.arange(blocks, device=call.q.device)

        def select(at: slice) -> TopBlocks:
            candidates = (block >= first[:, at]) & (block < current[:, at])
            for i in range(forced.shape[-1]):
                candidates = candidates & (block != forced[:, at, :, i : i + 1])
            keys = best_keys(importances(call, at), candidates, block, min(call.selected, blocks))
            return best_blocks(keys, forced[:, at], call.selected)

        step = max(1, SCORES_AT_ONCE // max(1, batch * heads * blocks))
        if torch.compiler.is_compiling() or step >= queries:
            return select(slice(None))
        chunks = [select(slice(t, t + step)) for t in range(0, queries, step)]
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*chunks, strict=True)))
