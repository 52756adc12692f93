"""The indexer's selection on a GPU: the scores of a chunk of queries, then the best keys of each of its rows.

Heads are rows ``head · BQ + query`` of one product, so that their sum stays within a thread.  Scores are stored as
integers of the same order.  The maxima of more than ``topk`` parts of a row bound its best scores from below; what
reaches the bound is collected, hardly more than ``topk``, and the best of it is found in registers.  On Hopper the
kernels of ``triton_sample.py`` come first, and do this for most rows.

Where more reach it than the space for them holds, four rounds over the row count how many have each value of the next
eight bits, and leave the score at which ``topk`` are reached; a last one takes those above it, and of those equal to it
the first.  Either way tokens stand in ascending order, so that a stable sort of their ranks, 32 bits, is all that is
left.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import load_rows, load_tile, within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device
from kernel_index.core.triton.products import is_hopper
from kernel_index.routing.lightning_indexer import triton_sample
from kernel_index.routing.triton_topk import LOW, NONE, rank_of, reached

NOTHING = tl.constexpr(-(2**63))

STAGES = tl.constexpr(4)
"""Tiles of a row that are on their way at once."""


@jit
def _head_rows(q_ptr, w_ptr, q_j, w_j, t, m_t, q_t, w_t, first, J, D, BLOCK_D, BQ: tl.constexpr, JG: tl.constexpr):
    """Rows [JG · BQ, BLOCK_D] and weights [JG · BQ] of JG heads from ``first`` on, and which of them there are."""
    o_m = tl.arange(0, JG * BQ)
    o_j = first + o_m // BQ
    o_t = t + o_m % BQ
    m_m = (o_t < m_t) & (o_j < J)
    b_q = load_rows(q_ptr, o_t.to(tl.int64) * q_t + o_j * q_j, m_m, D, BLOCK_D)
    b_w = tl.load(w_ptr + o_t.to(tl.int64) * w_t + o_j * w_j, mask=m_m, other=0.0).to(tl.float32)
    return b_q, b_w, o_j < J


@jit
def _weigh(
    b_q, b_w, m_head, b_k, BQ: tl.constexpr, JG: tl.constexpr, BN: tl.constexpr, PADDED: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The part of JG heads in the scores [BQ, BN]; ``TURNED``: keys are the rows of the product.

    ``PADDED``: of some heads that are not there, whose 0 times infinity must not count.
    """
    if UPCAST:
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    if TURNED:
        z = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, JG · BQ]
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) * b_w[None, :]
        if PADDED:
            z = tl.where(m_head[None, :], z, 0.0)
        return tl.trans(tl.sum(tl.reshape(z, (BN, JG, BQ)), 1))
    z = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [JG · BQ, BN]
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) * b_w[:, None]
    if PADDED:
        z = tl.where(m_head[:, None], z, 0.0)
    return tl.sum(tl.reshape(z, (JG, BQ, BN)), 0)


@jit
def _scores_kernel(
    q_ptr, k_ptr, w_ptr, start_ptr, end_ptr, ranks_ptr, done_ptr, q_b, q_t, q_j, k_b, k_s, w_b, w_t, w_j, bound_b,
    FIRST, STOP, S, J, SPAN, ROW,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, JG: tl.constexpr, HEAD_STEPS: tl.constexpr,
    BN: tl.constexpr, PADDED: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The ranks of the scores of BQ queries, but for those that are ``done``, for those of SPAN keys that one of them
    may see."""
    b = tl.program_id(2).to(tl.int64)
    t = FIRST + tl.program_id(0) * BQ
    o_t = t + tl.arange(0, BQ)  # [BQ]
    m_t = o_t < STOP
    if done_ptr is not None:
        m_t = m_t & (tl.load(done_ptr + b * (STOP - FIRST) + o_t - FIRST, mask=m_t, other=1) == 0)
    start = tl.load(start_ptr + b * bound_b + o_t, mask=m_t, other=S)  # [BQ]: a loop from 2³¹ − 1 on would overflow
    end = tl.load(end_ptr + b * bound_b + o_t, mask=m_t, other=0)  # [BQ]
    low = tl.maximum(tl.min(start, 0), tl.program_id(1) * SPAN)
    high = tl.minimum(tl.max(end, 0), tl.minimum((tl.program_id(1) + 1) * SPAN, S))
    low = low // BN * BN
    q_ptr += b * q_b
    w_ptr += b * w_b
    if HEAD_STEPS == 1:
        b_q, b_w, m_head = _head_rows(q_ptr, w_ptr, q_j, w_j, t, STOP, q_t, w_t, 0, J, D, BLOCK_D, BQ, JG)
    p_ranks = ranks_ptr + (b * (STOP - FIRST) + (o_t - FIRST)).to(tl.int64) * ROW  # [BQ]
    for first in range(low, high, BN):
        b_k = load_tile(k_ptr + b * k_b, first, k_s, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
        score = tl.zeros((BQ, BN), tl.float32)
        if HEAD_STEPS == 1:
            score = _weigh(b_q, b_w, m_head, b_k, BQ, JG, BN, PADDED, TURNED, PRECISION, UPCAST)
        else:
            for i in range(0, HEAD_STEPS):
                b_q, b_w, m_head = _head_rows(q_ptr, w_ptr, q_j, w_j, t, STOP, q_t, w_t, i * JG, J, D, BLOCK_D, BQ, JG)
                score += _weigh(b_q, b_w, m_head, b_k, BQ, JG, BN, PADDED, TURNED, PRECISION, UPCAST)
        o_n = first + tl.arange(0, BN)
        tl.store(p_ranks[:, None] + o_n[None, :], rank_of(score), mask=m_t[:, None] & (o_n < S)[None, :])


@jit
def _ranks(p_row, o_n, start, end, ROW):
    """Scores of the keys from start to end, else NONE: others may never have been stored."""
    return tl.where(within(o_n, start, end), tl.load(p_row + o_n, mask=o_n < ROW, other=NONE), NONE)


@jit
def _bound(p_row, start, end, need, ROW, MANY: tl.constexpr):
    """A rank, int64, that ``need`` keys reach and hardly more do: in ``need`` of MANY parts of the row there is one."""
    best = tl.full((MANY,), NONE, tl.int32)
    for first in tl.range(start // MANY * MANY, end, MANY, num_stages=STAGES):
        best = tl.maximum(best, _ranks(p_row, first + tl.arange(0, MANY), start, end, ROW))
    bound, _ = reached(best, need, tl.cast(NONE + 1, tl.int64))
    return bound


@jit
def _collect(p_row, p_found, start, end, bound, ROW, MANY: tl.constexpr, BN: tl.constexpr):
    """Store the first MANY keys of those that reach the bound; return how many there are."""
    count = start * 0
    for first in tl.range(start // BN * BN, end, BN, num_stages=STAGES):
        o_n = first + tl.arange(0, BN)
        rank = _ranks(p_row, o_n, start, end, ROW)
        m_found = rank >= bound.to(tl.int32)
        slot = count + tl.cumsum(m_found.to(tl.int32), 0) - 1
        tl.store(p_found + slot, (rank.to(tl.int64) << 31) + (o_n ^ LOW), mask=m_found & (slot < MANY))
        count += tl.sum(m_found.to(tl.int32), 0)
    return count


@jit
def _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES):
    """Number of the row of a program, and the keys that its query may see."""
    local, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + b * bound_b + FIRST + local)
    end = tl.load(end_ptr + b * bound_b + FIRST + local)
    return b * QUERIES + local, start, end


@jit
def _select_kernel(
    ranks_ptr, start_ptr, end_ptr, best_ptr, tokens_ptr, found_ptr, done_ptr, bound_b, FIRST, QUERIES, TOPK, ROW,
    SPACE, BN: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The best TOPK tokens of a query that may see more, ascending, and the ranks of their scores.

    ``done``: whether they are stored, which they are not where more than MANY keys reach the bound.
    """
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    if tl.load(done_ptr + row) != 0:
        return
    p_row, p_found = ranks_ptr + row * ROW, found_ptr + row * SPACE
    is_done = start * 0
    if end - start > TOPK:
        bound = _bound(p_row, start, end, TOPK, ROW, MANY)
        count = _collect(p_row, p_found, start, end, bound, ROW, MANY, BN)
        if count <= MANY:
            tl.debug_barrier()  # other threads of the program have stored some of them
            o_found = tl.arange(0, MANY)
            keys = tl.load(p_found + o_found, mask=o_found < count, other=NOTHING)
            least, _ = reached(keys, TOPK, bound << 31)
            m_take = keys >= least
            slot = row * TOPK + tl.cumsum(m_take.to(tl.int32), 0) - 1
            tl.store(best_ptr + slot, (keys >> 31).to(tl.int32), mask=m_take)
            tl.store(tokens_ptr + slot, ((keys & LOW) ^ LOW).to(tl.int32), mask=m_take)
            is_done += 1
    tl.store(done_ptr + row, is_done)


@jit
def _round(p_row, start, end, prefix, need, ROW, SHIFT: tl.constexpr, BN: tl.constexpr):
    """Eight bits more of ``prefix``, the bits that are known of the rank at which ``need`` keys are reached.

    And how many keys with these bits are still wanted.
    """
    counts = tl.zeros((256,), tl.int32)
    for first in range(start, end, BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < end
        rank = _ranks(p_row, o_n, start, end, ROW)
        if SHIFT == 24:
            digit = (rank >> 24) + 128  # the sign comes first
        else:
            digit = (rank >> SHIFT) & 255
            m_n = m_n & ((rank >> (SHIFT + 8)) == prefix)
        counts += tl.histogram(tl.where(m_n, digit, 0), 256, mask=m_n)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # [256]: keys of larger digits
    found = tl.sum((above >= need).to(tl.int32), 0)
    need -= tl.sum(tl.where(tl.arange(0, 256) == found, above, 0), 0)
    if SHIFT == 24:
        prefix = found - 128
    else:
        prefix = (prefix << 8) | found
    return prefix, need


@jit
def _rounds_kernel(
    ranks_ptr, start_ptr, end_ptr, best_ptr, tokens_ptr, done_ptr, bound_b, FIRST, QUERIES, TOPK, ROW,
    BN: tl.constexpr,
):  # fmt: skip
    """The best TOPK tokens of a query and their ranks, if they are not stored yet; then −1 and ``NONE``."""
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    if tl.load(done_ptr + row) != 0:
        return
    p_row, p_best, p_tokens = ranks_ptr + row * ROW, best_ptr + row * TOPK, tokens_ptr + row * TOPK
    need = tl.minimum(end - start, TOPK)
    threshold, equal = need * 0 + NONE, need
    if end - start > need:
        threshold, equal = _round(p_row, start, end, threshold, equal, ROW, 24, BN)
        threshold, equal = _round(p_row, start, end, threshold, equal, ROW, 16, BN)
        threshold, equal = _round(p_row, start, end, threshold, equal, ROW, 8, BN)
        threshold, equal = _round(p_row, start, end, threshold, equal, ROW, 0, BN)
    taken, seen = need * 0, need * 0
    for first in range(start, end, BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < end
        rank = _ranks(p_row, o_n, start, end, ROW)
        m_equal = m_n & (rank == threshold)
        m_take = (m_n & (rank > threshold)) | (m_equal & (seen + tl.cumsum(m_equal.to(tl.int32), 0) <= equal))
        slot = taken + tl.cumsum(m_take.to(tl.int32), 0) - 1
        tl.store(p_best + slot, rank, mask=m_take)
        tl.store(p_tokens + slot, o_n, mask=m_take)
        seen += tl.sum(m_equal.to(tl.int32), 0)
        taken += tl.sum(m_take.to(tl.int32), 0)
    for first in range(taken, TOPK, BN):
        o_n = first + tl.arange(0, BN)
        tl.store(p_best + o_n, tl.full((BN,), NONE, tl.int32), mask=o_n < TOPK)
        tl.store(p_tokens + o_n, tl.full((BN,), -1, tl.int32), mask=o_n < TOPK)


class Config(NamedTuple):
    """Queries and keys of a product, heads at once, warps, stages, precision of float32 products.

    ``turned``: keys are its rows, so that a warp reads few of them and the heads of all queries.
    """

    queries: int
    keys: int
    heads: int
    num_warps: int
    num_stages: int
    precision: str
    turned: bool = False


def pick_config(width: int, heads: int, element_bytes: int, target: Target) -> Config:
    """Few narrow heads are one product, whose rows stay in shared memory; others follow one after the other."""
    all_heads = next_power_of_2(heads)
    if interpreting():
        return Config(16, 16, min(2, all_heads), 4, 1, "ieee", turned=all_heads == 4)
    if element_bytes == 4:
        precision = "tf32x3" if target.arch in (90, 100) else "ieee"
        return Config(64, 32, 1, 4, 1, precision)
    roomy = target.arch in (90, 100)  # 227 KiB of shared memory
    if target.arch == 90 and width <= 64 and all_heads == 4:
        return Config(32, 64, 4, 4, 3, "ieee", turned=True)
    if roomy and width <= 64 and all_heads <= 4:
        return Config(64 if all_heads == 4 else 128, 64, all_heads, 4 if all_heads == 4 else 8, 3, "ieee")
    if width > 128:
        return Config(64, 64, 1, 4, 2 if roomy else 1, "ieee")
    return Config(128, 128, 1, 8, 2, "ieee") if roomy else Config(64, 64, 1, 4, 2, "ieee")


SPAN = 1024
"""Keys of a program: with more of them the last programs of a chunk work alone."""


def score(
    q: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, ranks: Tensor, first: int, done: Tensor | None = None
) -> None:
    """Fill what is visible of ``ranks`` int32 [B, T', S'] for the queries from ``first`` on that are not ``done``."""
    (B, _, J, D), S, queries = q.shape, k.shape[1], ranks.shape[1]
    c = pick_config(D, J, q.element_size(), target_of(q.device))
    with on_device(q):
        _scores_kernel[(ceil_div(queries, c.queries), ceil_div(S, SPAN), B)](
            q, k, w, start, end, ranks, done, *q.stride()[:3], *k.stride()[:2], *w.stride(),
            0 if start.shape[0] == 1 else start.shape[1], first, first + queries, S, J, SPAN, ranks.shape[2],
            D=D, BLOCK_D=dot_block(D), BQ=c.queries, JG=c.heads, HEAD_STEPS=ceil_div(J, c.heads), BN=c.keys,
            PADDED=J % c.heads != 0, TURNED=c.turned, PRECISION=c.precision, UPCAST=interpreting(),
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip


FEWEST = 1024
"""Parts of a row at least, and keys that may be collected of it."""

MOST = 8192
"""Of them at most, which are values in the registers of a program; a larger ``topk`` goes by rounds."""


def parts_of(topk: int) -> int:
    """Twice the next power of 2: of scores at random, 1.4 times ``topk`` are then expected to reach the bound."""
    parts = max(FEWEST, 2 * next_power_of_2(topk))
    return parts if parts <= MOST else 0


def found_of(many: int, like: Tensor) -> int:
    """Keys that there is space for in each row: more on Hopper, where a sample comes first; none if ``many`` is 0."""
    return triton_sample.found_of(many) if is_hopper(like) else many


def select(
    ranks: Tensor, start: Tensor, end: Tensor, picked: tuple[Tensor, Tensor], first: int, done: Tensor | None = None
) -> None:
    """Fill ranks and tokens int32 [B, T', topk], the tokens ascending; but not what is ``done`` by a sample."""
    B, queries, topk = picked[0].shape
    many, grid = parts_of(topk), (queries, B)
    sampled = done is not None
    if done is None:
        done = torch.zeros(B, queries, dtype=torch.int32, device=ranks.device)
    row = (0 if start.shape[0] == 1 else start.shape[1], first, queries, topk, ranks.shape[2])
    options = select_options(many, target_of(ranks.device))
    with on_device(ranks):
        if many:
            space = many if sampled else found_of(many, ranks)
            found = torch.empty(B, queries, space, dtype=torch.int64, device=ranks.device)
            if space > many:
                triton_sample.select(ranks, start, end, picked, first, (found, done))
            _select_kernel[grid](ranks, start, end, *picked, found, done, *row, space, MANY=many, **options)
        _rounds_kernel[grid](ranks, start, end, *picked, done, *row, BN=2048, num_warps=8)


def select_options(many: int, target: Target) -> dict[str, int]:
    """Keys of a step, warps, and registers of a thread at most: then four programs share an NVIDIA multiprocessor."""
    if many > 4096:
        return {"BN": 2048, "num_warps": 16}
    return {"BN": 1024, "num_warps": 4, **({"maxnreg": 128} if target.arch == 90 else {})}
