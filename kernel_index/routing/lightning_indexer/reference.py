"""The specification of the indexer: every score, then a stable sort."""

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.excluded import all_finite, finite_part
from kernel_index.routing.lightning_indexer.contract import IndexerCall
from kernel_index.routing.lightning_indexer.selection import TokenSelection, replayed
from kernel_index.routing.stable_topk import best_by_sorting

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores."""


def lightning_indexer_reference(call: IndexerCall) -> TokenSelection:
    (batch, queries, heads, _), keys = call.q.shape, call.k.shape[1]
    topk, replay = call.topk, call.replay
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    operands = [x.to(dtype) for x in (call.q, call.k, call.weights)]
    needs_care = rules.wants_gradient(*operands) and not (rules.host_readable(*operands) and all_finite(*operands))
    start, end = call.intervals()
    key = torch.arange(keys, device=call.q.device)

    def select(at: slice) -> tuple[Tensor, Tensor]:
        scores = _scores(operands, at)
        if replay is not None:
            indices = replayed(TokenSelection(*(x[:, at] for x in replay)), start[:, at], end[:, at])
        else:
            allowed = (key >= start[:, at, None]) & (key < end[:, at, None])
            indices = best_by_sorting(scores.detach(), allowed, topk)
        known = scores.gather(2, indices.clamp(min=0))
        if needs_care:
            known = _with_gradient_of(_scores([finite_part(x) for x in operands], at), indices, known.detach())
        return indices, known.masked_fill(indices < 0, -torch.inf)

    if keys == 0:
        scores = operands[0].new_full((batch, queries, topk), -torch.inf)
        return TokenSelection(torch.full_like(scores, -1, dtype=torch.int64), scores > 0, scores)
    if torch.compiler.is_compiling() or batch * queries * heads * keys <= SCORES_AT_ONCE:
        indices, scores = select(slice(None))
    else:
        step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
        chunks = [select(slice(t, t + step)) for t in range(0, queries, step)]
        indices, scores = (torch.cat(x, 1) for x in zip(*chunks, strict=True))
    return TokenSelection(indices, indices >= 0, scores)


def _scores(operands: list[Tensor], at: slice) -> Tensor:
    q, k, weights = operands
    z = torch.einsum("btjd,bsd->btjs", q[:, at], k).relu()
    return torch.einsum("btjs,btj->bts", z, weights[:, at])


def _with_gradient_of(scores: Tensor, indices: Tensor, known: Tensor) -> Tensor:
    """``known``, the selected scores, with a gradient that no operand enters which its query may not see.

    ``scores`` come from finite operands: the products with all keys, selected or not, are terms of the gradient, and
    0 · NaN would be NaN.  A score that is NaN makes NaN of its own query's gradient.
    """
    found = scores.gather(2, indices.clamp(min=0))
    found = found * torch.where(known.isnan() & (indices >= 0), torch.nan, 1.0)
    return found + torch.where(known.isinf(), known, 0.0)
