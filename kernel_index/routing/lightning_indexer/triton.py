"""The indexer's scores on a GPU, a chunk of queries at a time, and the maxima that bound the best of each row.

Heads are rows ``head · BQ + query`` of one product, so that their sum stays within a thread.  Every MANYth key of a row
is of one part.  A program takes BN parts, so that it sees all of their keys and their maxima stay in its registers;
``triton_select.py`` finds the best keys with them.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import load_rows, load_tile, within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device, processors
from kernel_index.routing.lightning_indexer import triton_select
from kernel_index.routing.lightning_indexer.triton_select import Scored, parts_of
from kernel_index.routing.triton_topk import rank_of

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
def _sees(start, end, m_t):
    """First key and end of what some query sees, and of what each of them does."""
    low, high = tl.max(tl.where(m_t, start, 0), 0), tl.min(tl.where(m_t, end, 2**31 - 1), 0)
    return tl.min(start, 0), tl.max(end, 0), low, high


@jit
def _score_tile(
    q_ptr, w_ptr, p_k, p_scores, b_q, b_w, q_t, q_j, k_s, w_t, w_j, t, m_t, first, STOP, S, J,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, JG: tl.constexpr, HEAD_STEPS: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store the scores [BQ, BN] of the keys from ``first`` on, and return them; rows of JG heads are loaded already."""
    b_k = load_tile(p_k, first, k_s, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    score = _weigh(b_q, b_w, b_k, BQ, JG, BN, PRECISION, UPCAST)
    for i in range(1, HEAD_STEPS):
        b_q, b_w = _head_rows(q_ptr, w_ptr, q_j, w_j, t, STOP, q_t, w_t, i * JG, J, D, BLOCK_D, BQ, JG)
        score += _weigh(b_q, b_w, b_k, BQ, JG, BN, PRECISION, UPCAST)
    o_n = first + tl.arange(0, BN)
    tl.store(p_scores[:, None] + o_n[None, :], score, mask=m_t[:, None])  # a row ends at a whole tile
    return score


@jit
def _tiles(key, part, MANY: tl.constexpr):
    """How many of the tiles that begin at key ``part`` of each MANY begin before ``key``."""
    return tl.cdiv(tl.maximum(key - part, 0), MANY)


@jit
def _score_parts(
    q_ptr, w_ptr, p_k, p_scores, p_maxima, b_q, b_w, start, end, every, every_end, low, high, part,
    q_t, q_j, k_s, w_t, w_j, t, m_t, STOP, S, J,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, JG: tl.constexpr, HEAD_STEPS: tl.constexpr,
    BN: tl.constexpr, MANY: tl.constexpr, MAXIMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BN parts from ``part`` on, of the keys from ``low`` to ``high``: first what every query sees, then the rest."""
    best = tl.full((BQ, BN), float("-inf"), tl.float32)
    begin, stop = _tiles(low - BN + 1, part, MANY), _tiles(high, part, MANY)
    whole = tl.minimum(tl.maximum(_tiles(every, part, MANY), begin), stop)
    whole_stop = tl.minimum(tl.maximum(_tiles(every_end - BN + 1, part, MANY), whole), stop)
    for i in range(whole, whole_stop):
        score = _score_tile(
            q_ptr, w_ptr, p_k, p_scores, b_q, b_w, q_t, q_j, k_s, w_t, w_j, t, m_t, i * MANY + part, STOP, S, J,
            D, BLOCK_D, BQ, JG, HEAD_STEPS, BN, PRECISION, UPCAST,
        )  # fmt: skip
        if MAXIMA:
            best = tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL)
    for j in tl.range(0, whole - begin + stop - whole_stop, num_stages=1):
        first = tl.where(begin + j < whole, begin + j, whole_stop - whole + begin + j) * MANY + part
        score = _score_tile(
            q_ptr, w_ptr, p_k, p_scores, b_q, b_w, q_t, q_j, k_s, w_t, w_j, t, m_t, first, STOP, S, J,
            D, BLOCK_D, BQ, JG, HEAD_STEPS, BN, PRECISION, UPCAST,
        )  # fmt: skip
        if MAXIMA:
            m_seen = within((first + tl.arange(0, BN))[None, :], start[:, None], end[:, None])
            best = tl.maximum(best, tl.where(m_seen, score, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    if MAXIMA:
        tl.store(p_maxima[:, None] + (part + tl.arange(0, BN))[None, :], rank_of(best), mask=m_t[:, None])


@jit
def _scores_kernel(
    q_ptr, k_ptr, w_ptr, start_ptr, end_ptr, scores_ptr, maxima_ptr, q_b, q_t, q_j, k_b, k_s, w_b, w_t, w_j, bound_b,
    FIRST, STOP, S, J, ROW, BATCH, SPANS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, JG: tl.constexpr, HEAD_STEPS: tl.constexpr,
    BN: tl.constexpr, MANY: tl.constexpr, SPAN: tl.constexpr, MAXIMA: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The scores of BQ queries for BN parts of the keys that one of them may see, within SPAN keys of the row.

    And the rank of the largest that a query sees of each part, if MAXIMA.  Few programs divide all of these, so that
    one loads the queries of a tile for many parts.
    """
    columns = tl.minimum(tl.cdiv(ROW, BN), MANY // BN)
    tiles, each = tl.cdiv(STOP - FIRST, BQ), columns * SPANS
    here, items = tl.program_id(0).to(tl.int64), (BATCH * tiles * each).to(tl.int64)
    at, at_end = (
        (here * items // tl.num_programs(0)).to(tl.int32),
        ((here + 1) * items // tl.num_programs(0)).to(tl.int32),
    )
    for tile in range(at // each, tl.cdiv(at_end, each)):
        b, t = (tile // tiles).to(tl.int64), FIRST + tile % tiles * BQ
        o_t = t + tl.arange(0, BQ)  # [BQ]
        m_t = o_t < STOP
        start = tl.load(start_ptr + b * bound_b + o_t, mask=m_t, other=2**31 - 1)  # [BQ]
        end = tl.load(end_ptr + b * bound_b + o_t, mask=m_t, other=0)  # [BQ]
        p_q, p_w = q_ptr + b * q_b, w_ptr + b * w_b
        b_q, b_w = _head_rows(p_q, p_w, q_j, w_j, t, STOP, q_t, w_t, 0, J, D, BLOCK_D, BQ, JG)
        some, any_end, every, every_end = _sees(start, end, m_t)
        row = b * (STOP - FIRST) + (o_t - FIRST)  # [BQ]
        rows = (BATCH * (STOP - FIRST)).to(tl.int64)
        for i in range(tl.maximum(at, tile * each) - tile * each, tl.minimum(at_end, tile * each + each) - tile * each):
            span = i // columns
            low, high = tl.maximum(some, span * SPAN), tl.minimum(tl.minimum(any_end, (span + 1) * SPAN), S)
            if low < high:
                _score_parts(
                    p_q, p_w, k_ptr + b * k_b, scores_ptr + row * ROW, maxima_ptr + (span * rows + row) * MANY,
                    b_q, b_w, start, end, every, every_end, low, high, i % columns * BN,
                    q_t, q_j, k_s, w_t, w_j, t, m_t, STOP, S, J,
                    D, BLOCK_D, BQ, JG, HEAD_STEPS, BN, MANY, MAXIMA, PRECISION, UPCAST,
                )  # fmt: skip


class Config(NamedTuple):
    """Queries and keys of a product, heads at once, warps, stages, precision of float32 products.

    ``programs``: how many a multiprocessor runs at once; ``registers``: of a thread at most, for that.
    """

    queries: int
    keys: int
    heads: int
    num_warps: int
    num_stages: int
    precision: str
    programs: int = 2
    registers: int | None = None


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
        return Config(64 if all_heads == 4 else 128, 64, all_heads, 4 if all_heads == 4 else 8, 3, "ieee")
    if width > 128:
        return Config(64, 64, 1, 4, 2 if roomy else 1, "ieee")
    return Config(128, 128, 1, 8, 2, "ieee") if roomy else Config(64, 64, 1, 4, 2, "ieee")


def score(q: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, scored: Scored, first: int) -> None:
    """Fill what is visible of ``scored`` for the queries from ``first`` on."""
    (B, _, J, D), S, queries = q.shape, k.shape[1], scored.scores.shape[1]
    c, (scores, maxima, many) = pick_config(D, J, q.element_size(), target_of(q.device)), scored
    row, span = scores.shape[2], many * triton_select.SPANS
    spans = ceil_div(S, span)
    items = ceil_div(queries, c.queries) * B * spans * min(ceil_div(row, c.keys), many // c.keys)
    with on_device(q):
        _scores_kernel[(min(items, processors(q) * c.programs),)](
            q, k, w, start, end, scores, maxima, *q.stride()[:3], *k.stride()[:2], *w.stride(),
            0 if start.shape[0] == 1 else start.shape[1], first, first + queries, S, J, row, B, spans,
            D=D, BLOCK_D=dot_block(D), BQ=c.queries, JG=c.heads, HEAD_STEPS=ceil_div(J, c.heads), BN=c.keys,
            MANY=many, SPAN=span, MAXIMA=maxima.numel() > 0, PRECISION=c.precision, UPCAST=interpreting(),
            num_warps=c.num_warps, num_stages=c.num_stages, **({} if c.registers is None else {"maxnreg": c.registers}),
        )  # fmt: skip


def best(
    q: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, topk: int, outputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fill ``outputs`` with the tokens of each query's best scores and these scores, best first; then −1 and −∞."""
    (B, T), S, parts = q.shape[:2], k.shape[1], parts_of(topk)
    row = ceil_div(S, 128) * 128  # whole tiles of every size
    spans = ceil_div(max(1, S), max(1, parts * triton_select.SPANS))
    step = max(1, SCORES_BYTES // max(1, B * (4 * row + (8 + 4 * spans) * parts)) // 128) * 128
    for first in range(0, T if B else 0, step):
        queries = min(step, T - first)
        scores = torch.empty(B, queries, row, dtype=torch.float32, device=q.device)
        maxima = torch.empty(spans, B, queries, parts, dtype=torch.int32, device=q.device)
        scored = Scored(scores, maxima, parts or triton_select.MOST)
        if S:
            score(q, k, w, start, end, scored, first)
        ranks = torch.empty(B, queries, topk, dtype=torch.int32, device=q.device)
        picked = ranks, torch.empty_like(ranks)
        triton_select.select(scored, start, end, picked, first)
        triton_select.sort(picked, outputs, first)
    return outputs
