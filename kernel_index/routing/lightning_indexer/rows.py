"""The indexer under ``numerics("invariant")``: scores by products whose rows do not depend on each other."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.products import product
from kernel_index.routing.topk_keys import NOTHING, best_keys, index_of

SCORES_AT_ONCE = 1 << 18
"""Queries are taken in chunks of at most this many scores, 16 times as many on a GPU, but ``FEWEST`` at least."""

FEWEST = 16


def rows_topk(
    q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, topk: int,
    multiply: Callable[..., Tensor] = product.launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices int64 and scores float32 [B, T, topk], best first; ``start`` and ``end`` int32 [B or 1, T]."""
    indices = q.new_full((*q.shape[:2], topk), -1, dtype=torch.int64)
    scores = q.new_full((*q.shape[:2], topk), -torch.inf, dtype=torch.float32)
    limit = SCORES_AT_ONCE * (16 if q.is_cuda else 1)
    for b in range(len(q)):
        bounds = start[b % len(start)], end[b % len(end)]
        for chunk in _chunks(*bounds, limit):
            at, first, last = chunk
            key = torch.arange(first, last, device=q.device)
            z = _scores(multiply, q[b, at], k[b, first:last], weights[b, at].float())
            allowed = (key >= bounds[0][at, None]) & (key < bounds[1][at, None])
            count = min(topk, len(key))
            best = best_keys(z, allowed, key, count).sort(-1, descending=True).values
            some = best > NOTHING
            indices[b, at, :count] = torch.where(some, index_of(best), -1)
            place = (index_of(best) - first).clamp(0, len(key) - 1)
            scores[b, at, :count] = torch.where(some, z.gather(1, place), -torch.inf)
    return indices, scores


class _Chunk(NamedTuple):
    """Queries that are scored together, and the first and last of the keys that one of them may see."""

    queries: slice
    first: int
    last: int


def _chunks(start: Tensor, end: Tensor, limit: int) -> Iterator[_Chunk]:
    """All queries that may see a key.  Packed documents cost what they cost alone, and a causal row its half."""
    first, last = start.cpu().long(), end.cpu().long()
    empty = first >= last
    first, last = first.masked_fill(empty, 2**31), last.masked_fill(empty, 0)
    t, queries = 0, len(first)
    while t < queries:
        step = FEWEST
        while t + step < queries and 2 * step * _span(first[t : t + 2 * step], last[t : t + 2 * step]) <= limit:
            step *= 2
        at = slice(t, min(t + step, queries))
        if _span(first[at], last[at]):
            yield _Chunk(at, int(first[at].min()), int(last[at].max()))
        t += step


def _span(first: Tensor, last: Tensor) -> int:
    """Keys from the first to the last that one of the queries may see."""
    return max(0, int(last.max()) - int(first.min()))


def _scores(multiply: Callable[..., Tensor], q_TJD: Tensor, k_SD: Tensor, weights_TJ: Tensor) -> Tensor:
    """``Σ_j w_j·relu(q_j·k)``, the heads in their order."""
    found = None
    for j in range(q_TJD.shape[1]):
        z = multiply(q_TJD[:, j], k_SD, None, torch.float32).relu() * weights_TJ[:, j, None]
        found = z if found is None else found + z
    assert found is not None
    return found
