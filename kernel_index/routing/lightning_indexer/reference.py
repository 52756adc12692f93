"""The specification of the indexer: every score, then a stable sort."""

import torch
from torch import Tensor

from kernel_index.routing.lightning_indexer.contract import IndexerCall
from kernel_index.routing.lightning_indexer.selection import TokenSelection, replayed
from kernel_index.routing.stable_topk import best_by_sorting

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores."""


def lightning_indexer_reference(call: IndexerCall) -> TokenSelection:
    (batch, queries, heads, _), keys = call.q.shape, call.k.shape[1]
    topk, replay = call.topk, call.replay
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    q, k, weights = (x.to(dtype) for x in (call.q, call.k, call.weights))
    start, end = call.intervals()
    key = torch.arange(keys, device=q.device)

    def select(at: slice) -> tuple[Tensor, Tensor]:
        z = torch.einsum("btjd,bsd->btjs", q[:, at], k).relu()
        scores = torch.einsum("btjs,btj->bts", z, weights[:, at])
        if replay is not None:
            indices = replayed(TokenSelection(*(x[:, at] for x in replay)), start[:, at], end[:, at])
        else:
            allowed = (key >= start[:, at, None]) & (key < end[:, at, None])
            indices = best_by_sorting(scores.detach(), allowed, topk)
        return indices, scores.gather(2, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)

    if keys == 0:
        scores = q.new_full((batch, queries, topk), -torch.inf)
        return TokenSelection(torch.full_like(scores, -1, dtype=torch.int64), scores > 0, scores)
    if torch.compiler.is_compiling() or batch * queries * heads * keys <= SCORES_AT_ONCE:
        indices, scores = select(slice(None))
    else:
        step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
        chunks = [select(slice(t, t + step)) for t in range(0, queries, step)]
        indices, scores = (torch.cat(x, 1) for x in zip(*chunks, strict=True))
    return TokenSelection(indices, indices >= 0, scores)
