"""The indexer under ``numerics("invariant")``: scores by products whose rows do not depend on each other."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernel_index.core.products import product
from kernel_index.routing.topk_keys import NOTHING, best_keys, index_of

SCORES_AT_ONCE = 1 << 22
"""Queries are taken in chunks of at most this many scores."""


def rows_topk(
    q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, topk: int,
    multiply: Callable[..., Tensor] = product.launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices int64 and scores float32 [B, T, topk], best first; ``start`` and ``end`` int32 [B or 1, T]."""
    (batch, queries), keys = q.shape[:2], k.shape[1]
    indices = q.new_full((batch, queries, topk), -1, dtype=torch.int64)
    scores = q.new_full((batch, queries, topk), -torch.inf, dtype=torch.float32)
    step, key = max(1, SCORES_AT_ONCE // max(1, keys)), torch.arange(keys, device=q.device)
    for b in range(batch):
        for t in range(0, queries if keys else 0, step):
            at = slice(t, t + step)
            z = _scores(multiply, q[b, at], k[b], weights[b, at].float())
            allowed = (key >= start[b % len(start), at, None]) & (key < end[b % len(end), at, None])
            count = min(topk, keys)
            best = best_keys(z, allowed, key, count).sort(-1, descending=True).values
            some = best > NOTHING
            indices[b, at, :count] = torch.where(some, index_of(best), -1)
            scores[b, at, :count] = torch.where(some, z.gather(1, index_of(best).clamp(0, keys - 1)), -torch.inf)
    return indices, scores


def _scores(multiply: Callable[..., Tensor], q_TJD: Tensor, k_SD: Tensor, weights_TJ: Tensor) -> Tensor:
    """``Σ_j w_j·relu(q_j·k)``, the heads in their order."""
    found = None
    for j in range(q_TJD.shape[1]):
        z = multiply(q_TJD[:, j], k_SD, None, torch.float32).relu() * weights_TJ[:, j, None]
        found = z if found is None else found + z
    assert found is not None
    return found
