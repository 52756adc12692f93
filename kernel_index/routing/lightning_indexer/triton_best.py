"""The tokens of each query's best scores, best first, on a GPU: chunks of queries, and the kernels that each goes by.

On Hopper the kernels of ``triton_scored.py`` come first: scores that are too small by a sample are never stored.  Rows
of which a sample says too little, and all rows elsewhere, go by ``triton.py``.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device
from kernel_index.core.triton.products import is_hopper
from kernel_index.routing.lightning_indexer import triton_order, triton_scored
from kernel_index.routing.lightning_indexer.triton_rounds import found_of, parts_of, score, select
from kernel_index.routing.triton_topk import LOW, NONE

SCORES_BYTES = 1 << 30
"""Of the scores of a chunk of queries, and of what is collected of them."""

PICKED_BYTES = 1 << 28
"""Of the selected tokens and their ranks, before they are sorted."""


@jit
def _unpack_kernel(
    best_ptr, order_ptr, tokens_ptr, indices_ptr, scores_ptr, FIRST, QUERIES, T, TOPK, BN: tl.constexpr
):  # fmt: skip
    """Index and score of each rank of one query, whose token stands where ``order`` says; −1 and −∞ at last."""
    b, local = tl.program_id(1).to(tl.int64), tl.program_id(0)
    given, row = (b * QUERIES + local) * TOPK, (b * T + FIRST + local) * TOPK
    for first in range(0, TOPK, BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < TOPK
        rank = tl.load(best_ptr + given + o_n, mask=m_n, other=NONE)
        token = tl.load(tokens_ptr + given + tl.load(order_ptr + given + o_n, mask=m_n, other=0), mask=m_n, other=-1)
        score = (rank ^ ((rank >> 31) & LOW)).to(tl.float32, bitcast=True)
        tl.store(indices_ptr + row + o_n, token.to(tl.int64), mask=m_n)
        tl.store(scores_ptr + row + o_n, tl.where(rank > NONE, score, float("-inf")), mask=m_n)


def unpack(picked: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], first: int) -> None:
    """Fill the rows of ``outputs``, indices int64 and scores float32 [B, T, topk], best first."""
    (ranks, tokens), T = picked, outputs[0].shape[1]
    B, queries, topk = ranks.shape
    if is_hopper(ranks) and triton_order.takes(topk):
        with on_device(ranks):
            triton_order.order(picked, outputs, first)
        return
    ranks, order = torch.sort(ranks, dim=-1, descending=True, stable=True)  # of equal scores the first comes first
    with on_device(ranks):
        _unpack_kernel[(queries, B)](
            ranks, order, tokens, *outputs, first, queries, T, topk, BN=min(1024, max(16, next_power_of_2(topk))),
            num_warps=4,
        )  # fmt: skip


def best(
    q: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, topk: int, outputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fill ``outputs`` with the tokens of each query's best scores and these scores, best first; then −1 and −∞."""
    (B, T), S = q.shape[:2], k.shape[1]
    if triton_scored.takes(q, k, topk, parts_of(topk)):
        for b in range(B):
            bounds = start[b % len(start)][None], end[b % len(end)][None]
            _by_bounds(*(x[b : b + 1] for x in (q, k, w)), *bounds, topk, tuple(x[b : b + 1] for x in outputs))
        return outputs
    row = ceil_div(S, 32) * 32
    step = max(1, SCORES_BYTES // max(1, B * (4 * row + 8 * found_of(parts_of(topk), q))) // 128) * 128
    for first in range(0, T if B else 0, step):
        queries = min(step, T - first)
        ranks = torch.empty(B, queries, row, dtype=torch.int32, device=q.device)
        if S:
            score(q, k, w, start, end, ranks, first)
        picked = _allocate(B, queries, topk, q)
        select(ranks, start, end, picked, first)
        unpack(picked, outputs, first)
    return outputs


def _allocate(B: int, queries: int, topk: int, like: Tensor) -> tuple[Tensor, Tensor]:
    ranks, tokens = (torch.empty(B, queries, topk, dtype=torch.int32, device=like.device) for _ in range(2))
    return ranks, tokens


def _by_bounds(
    q: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, topk: int, outputs: tuple[Tensor, ...]
) -> None:
    """Of one batch row: scores that reach a bound, never all of them; and the rows that are left in the other way."""
    T, row, many = q.shape[1], ceil_div(k.shape[1], 32) * 32, parts_of(topk)
    call = q[0], triton_scored.turned(k[0]), w[0]
    unit = triton_scored.queries_at_once(q)
    group = max(1, PICKED_BYTES // (8 * topk) // unit) * unit
    for first in range(0, T, group):
        queries = min(group, T - first)
        picked, done = _allocate(1, queries, topk, q), torch.zeros(1, queries, dtype=torch.int32, device=q.device)
        for at in _cuts(queries, triton_scored.bytes_of(many), unit):
            some = picked[0][:, at], picked[1][:, at]
            triton_scored.select(call, (start[0], end[0]), some, first + at.start, done[:, at], many)
        for at in _cuts(queries, 4 * row + 8 * many, 128):
            ranks = torch.empty(1, at.stop - at.start, row, dtype=torch.int32, device=q.device)
            score(q, k, w, start, end, ranks, first + at.start, done[:, at])
            select(ranks, start, end, (picked[0][:, at], picked[1][:, at]), first + at.start, done[:, at])
        unpack(picked, (outputs[0], outputs[1]), first)


def _cuts(queries: int, bytes_of_query: int, unit: int) -> list[slice]:
    """Stretches of queries, multiples of a unit, whose memory is bounded."""
    step = max(1, SCORES_BYTES // bytes_of_query // unit) * unit
    return [slice(at, min(at + step, queries)) for at in range(0, queries, step)]
