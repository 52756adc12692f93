"""The indexer's selection on a GPU: the scores of a chunk of queries, then the best keys of each of its rows.

Heads are rows ``head · BQ + query`` of one product, so that their sum stays within a thread.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import load_rows, load_tile
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device
from kernel_index.routing.lightning_indexer.triton_select import parts_of, select, unpack

SCORES_BYTES = 1 << 29
"""Of the scores of a chunk of queries, and of what is collected of them."""


@jit
def _head_rows(q_ptr, w_ptr, q_j, w_j, t, m_t, q_t, w_t, first, J, D, BLOCK_D, BQ: tl.constexpr, JG: tl.constexpr):
    """Rows [JG · BQ, BLOCK_D] and weights [JG · BQ] of JG heads from ``first`` on."""
    o_m = tl.arange(0, JG * BQ)
    o_j = first + o_m // BQ
    o_t = t + o_m % BQ
    m_m = (o_t < m_t) & (o_j < J)
    b_q = load_rows(q_ptr, o_t.to(tl.int64) * q_t + o_j * q_j, m_m, D, BLOCK_D)
    return b_q, tl.load(w_ptr + o_t.to(tl.int64) * w_t + o_j * w_j, mask=m_m, other=0.0).to(tl.float32)


@jit
def _weigh(
    b_q, b_w, b_k, BQ: tl.constexpr, JG: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """The part of JG heads in the scores [BQ, BN]."""
    if UPCAST:
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    z = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [JG · BQ, BN]
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) * b_w[:, None]
    return tl.sum(tl.reshape(z, (JG, BQ, BN)), 0)


@jit
def _scores_kernel(
    q_ptr, k_ptr, w_ptr, start_ptr, end_ptr, scores_ptr, q_b, q_t, q_j, k_b, k_s, w_b, w_t, w_j, bound_b,
    FIRST, STOP, S, J, SPAN, ROW,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, JG: tl.constexpr, HEAD_STEPS: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The scores of BQ queries for those of SPAN keys that one of them may see."""
    b = tl.program_id(2).to(tl.int64)
    t = FIRST + tl.program_id(0) * BQ
    o_t = t + tl.arange(0, BQ)  # [BQ]
    m_t = o_t < STOP
    start = tl.load(start_ptr + b * bound_b + o_t, mask=m_t, other=2**31 - 1)  # [BQ]
    end = tl.load(end_ptr + b * bound_b + o_t, mask=m_t, other=0)  # [BQ]
    low = tl.maximum(tl.min(start, 0), tl.program_id(1) * SPAN)
    high = tl.minimum(tl.max(end, 0), tl.minimum((tl.program_id(1) + 1) * SPAN, S))
    low = low // BN * BN
    q_ptr += b * q_b
    w_ptr += b * w_b
    if HEAD_STEPS == 1:
        b_q, b_w = _head_rows(q_ptr, w_ptr, q_j, w_j, t, STOP, q_t, w_t, 0, J, D, BLOCK_D, BQ, JG)
    p_scores = scores_ptr + (b * (STOP - FIRST) + (o_t - FIRST)).to(tl.int64) * ROW  # [BQ]
    for first in range(low, high, BN):
        b_k = load_tile(k_ptr + b * k_b, first, k_s, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
        score = tl.zeros((BQ, BN), tl.float32)
        if HEAD_STEPS == 1:
            score = _weigh(b_q, b_w, b_k, BQ, JG, BN, PRECISION, UPCAST)
        else:
            for i in range(0, HEAD_STEPS):
                b_q, b_w = _head_rows(q_ptr, w_ptr, q_j, w_j, t, STOP, q_t, w_t, i * JG, J, D, BLOCK_D, BQ, JG)
                score += _weigh(b_q, b_w, b_k, BQ, JG, BN, PRECISION, UPCAST)
        o_n = first + tl.arange(0, BN)
        tl.store(p_scores[:, None] + o_n[None, :], score, mask=m_t[:, None])  # a row has space for whole tiles


class Config(NamedTuple):
    """Queries and keys of a product, heads at once, warps, stages, precision of float32 products."""

    queries: int
    keys: int
    heads: int
    num_warps: int
    num_stages: int
    precision: str


def pick_config(width: int, heads: int, element_bytes: int, target: Target) -> Config:
    """Few narrow heads are one product, whose rows stay in shared memory; others follow one after the other."""
    all_heads = next_power_of_2(heads)
    if interpreting():
        return Config(16, 16, min(2, all_heads), 4, 1, "ieee")
    if element_bytes == 4:
        precision = "tf32x3" if target.arch in (90, 100) else "ieee"
        return Config(64, 32, 1, 4, 1, precision)
    roomy = target.arch in (90, 100)  # 227 KiB of shared memory
    if roomy and width <= 64 and all_heads <= 4:
        if all_heads == 4:
            return Config(64, 32, 4, 4, 3, "ieee")  # four programs for a multiprocessor
        return Config(128, 64, all_heads, 8, 3, "ieee")
    if width > 128:
        return Config(64, 64, 1, 4, 2 if roomy else 1, "ieee")
    return Config(128, 128, 1, 8, 2, "ieee") if roomy else Config(64, 64, 1, 4, 2, "ieee")


SPAN = 1024
"""Keys of a program: with more of them the last programs of a chunk work alone."""

WHOLE = 128
"""Keys of a tile at most: rows are that much longer."""


def score(q: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, scores: Tensor, first: int) -> None:
    """Fill what is visible of ``scores`` float32 [B, T', S'], S' a multiple of ``WHOLE``, for the queries from ``first`` on."""
    (B, _, J, D), S, queries = q.shape, k.shape[1], scores.shape[1]
    c = pick_config(D, J, q.element_size(), target_of(q.device))
    with on_device(q):
        _scores_kernel[(ceil_div(queries, c.queries), ceil_div(S, SPAN), B)](
            q, k, w, start, end, scores, *q.stride()[:3], *k.stride()[:2], *w.stride(),
            0 if start.shape[0] == 1 else start.shape[1], first, first + queries, S, J, SPAN, scores.shape[2],
            D=D, BLOCK_D=dot_block(D), BQ=c.queries, JG=c.heads, HEAD_STEPS=ceil_div(J, c.heads), BN=c.keys,
            PRECISION=c.precision, UPCAST=interpreting(), num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip


def best(
    q: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, topk: int, outputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fill ``outputs`` with the tokens of each query's best scores and these scores, best first; then −1 and −∞."""
    (B, T), S = q.shape[:2], k.shape[1]
    row = ceil_div(S, WHOLE) * WHOLE
    step = max(1, SCORES_BYTES // max(1, B * (4 * row + 8 * parts_of(topk))) // 128) * 128
    for first in range(0, T if B else 0, step):
        queries = min(step, T - first)
        scores = torch.empty(B, queries, row, dtype=torch.float32, device=q.device)
        if S:
            score(q, k, w, start, end, scores, first)
        picked = tuple(torch.empty(B, queries, topk, dtype=torch.int32, device=q.device) for _ in range(2))
        select(scores, start, end, picked, first)
        unpack(picked, outputs, first)
    return outputs
