"""The best scores of a row on a GPU, from its scores and from the maxima of its parts.

The maxima of more than ``topk`` parts of a row bound its best scores from below; what reaches the bound is collected,
hardly more than ``topk``, and the best of it is found in registers.

Where more reach it than the space for them holds, four rounds over the row count how many have each value of the next
eight bits, and leave the score at which ``topk`` are reached; a last one takes those above it, and of those equal to it
the first.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import target_of
from kernel_index.core.triton.attention import within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device
from kernel_index.routing.triton_topk import LOW, NONE, rank_of, reached

NOTHING = tl.constexpr(-(2**63))
"""Below every key."""

STAGES = tl.constexpr(4)
"""Tiles of a row that are on their way at once."""

SPANS = 16
"""Keys of a part whose maximum one program finds."""


class Scored(NamedTuple):
    """Scores float32 [B, T', S'] and ranks of the maxima of their parts, int32 [spans, B, T', parts].

    Key s is of part ``s % parts``, and of span ``s // (SPANS · parts)``.  Where there are no maxima, ``parts`` only
    says how the work is divided.  What no query sees has never been stored.
    """

    scores: Tensor
    maxima: Tensor
    parts: int


@jit
def _ranks(p_row, o_n, start, end, ROW):
    """Ranks of the scores of the keys from start to end, else NONE: others may never have been stored."""
    return tl.where(within(o_n, start, end), rank_of(tl.load(p_row + o_n, mask=o_n < ROW, other=0.0)), NONE)


@jit
def _bound(p_maxima, start, end, need, rows, ROW, MANY: tl.constexpr, SPAN: tl.constexpr):
    """A rank, int64, that ``need`` keys reach and hardly more do: in ``need`` of MANY parts of the row there is one.

    A part of which the query sees no key has NONE, or the rank of −∞, which every key reaches that the query sees.
    """
    o_part, best = tl.arange(0, MANY), tl.full((MANY,), NONE, tl.int32)
    for span in range(start // SPAN, tl.cdiv(end, SPAN)):
        best = tl.maximum(best, tl.load(p_maxima + span * rows * MANY + o_part, mask=o_part < ROW, other=NONE))
    bound, _ = reached(best, need, tl.maximum(tl.min(best, 0), NONE + 1).to(tl.int64))
    return bound


@jit
def _score_of(rank):
    """float32 of its rank; NaN of what no score has."""
    return (rank ^ ((rank >> 31) & LOW)).to(tl.float32, bitcast=True)


@jit
def _hits(p_row, start, end, least, begin, stop, MANY: tl.constexpr):
    """A bit for each of the keys ``i · MANY + part``, ``begin`` ≤ i < ``stop``, that are not below ``least`` [MANY]."""
    bits = tl.zeros((MANY,), tl.int32)
    for i in tl.range(begin, stop, num_stages=STAGES):
        o_n = i * MANY + tl.arange(0, MANY)
        m_n = within(o_n, start, end)
        score = tl.load(p_row + o_n, mask=m_n, other=0.0)
        bits |= tl.where(m_n & ((score < least) == 0), 1, 0) << (i - begin)  # NaN is above every number
    return bits


@jit
def _collect(p_row, p_found, start, end, bound, MANY: tl.constexpr, SPANS: tl.constexpr):
    """Store the first MANY keys of those that reach the bound, in order; return how many there are.

    A thread finds which keys of its parts do.  Two of a part are counted at once, each in 16 bits of 32, so that
    threads wait for each other once in 2 · MANY keys.
    """
    o_part, count, least = tl.arange(0, MANY), start * 0, _score_of(bound.to(tl.int32))
    for begin in range(start // MANY, tl.cdiv(end, MANY), SPANS):
        stop = tl.minimum(begin + SPANS, tl.cdiv(end, MANY))
        bits = _hits(p_row, start, end, least, begin, stop, MANY)
        for two in range(begin, stop, 2):
            here = bits >> (two - begin)
            packed = (here & 1) | ((here & 2) << 15)
            before, total = tl.cumsum(packed, 0) - packed, tl.sum(packed, 0)
            for j in tl.static_range(2):
                m_found, o_n = ((here >> j) & 1) != 0, (two + j) * MANY + o_part
                rank = rank_of(tl.load(p_row + o_n, mask=m_found, other=0.0))
                slot = count + ((before >> (16 * j)) & 0xFFFF)
                tl.store(p_found + slot, (rank.to(tl.int64) << 31) + (o_n ^ LOW), mask=m_found & (slot < MANY))
                count += (total >> (16 * j)) & 0xFFFF
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
    scores_ptr, maxima_ptr, start_ptr, end_ptr, ranks_ptr, tokens_ptr, found_ptr, done_ptr, bound_b, FIRST, QUERIES,
    TOPK, ROW, MANY: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """The best TOPK tokens of a query that may see more, ascending, and the ranks of their scores.

    ``done``: whether they are stored, which they are not where more than MANY keys reach the bound.
    """
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    p_row, p_found = scores_ptr + row * ROW, found_ptr + row * MANY
    is_done = start * 0
    if end - start > TOPK:
        rows = tl.num_programs(1).to(tl.int64) * QUERIES
        bound = _bound(maxima_ptr + row * MANY, start, end, TOPK, rows, ROW, MANY, SPANS * MANY)
        count = _collect(p_row, p_found, start, end, bound, MANY, SPANS)
        if count <= MANY:
            tl.debug_barrier()  # other threads of the program have stored some of them
            o_found = tl.arange(0, MANY)
            keys = tl.load(p_found + o_found, mask=o_found < count, other=NOTHING)
            least, _ = reached(keys, TOPK, bound << 31)
            m_take = keys >= least
            slot = row * TOPK + tl.cumsum(m_take.to(tl.int32), 0) - 1
            tl.store(ranks_ptr + slot, (keys >> 31).to(tl.int32), mask=m_take)
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
    scores_ptr, start_ptr, end_ptr, ranks_ptr, tokens_ptr, done_ptr, bound_b, FIRST, QUERIES, TOPK, ROW,
    BN: tl.constexpr,
):  # fmt: skip
    """The best TOPK tokens of a query and their ranks, if they are not stored yet; then −1 and ``NONE``."""
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    if tl.load(done_ptr + row) != 0:
        return
    p_row, p_ranks, p_tokens = scores_ptr + row * ROW, ranks_ptr + row * TOPK, tokens_ptr + row * TOPK
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
        tl.store(p_ranks + slot, rank, mask=m_take)
        tl.store(p_tokens + slot, o_n, mask=m_take)
        seen += tl.sum(m_equal.to(tl.int32), 0)
        taken += tl.sum(m_take.to(tl.int32), 0)
    for first in range(taken, TOPK, BN):
        o_n = first + tl.arange(0, BN)
        tl.store(p_ranks + o_n, tl.full((BN,), NONE, tl.int32), mask=o_n < TOPK)
        tl.store(p_tokens + o_n, tl.full((BN,), -1, tl.int32), mask=o_n < TOPK)


@jit
def _unpack_kernel(
    ranks_ptr, order_ptr, tokens_ptr, indices_ptr, scores_ptr, FIRST, QUERIES, T, TOPK, BN: tl.constexpr
):
    """Index and score of each rank of one query, whose token stands where ``order`` says; −1 and −∞ at last."""
    b, local = tl.program_id(1).to(tl.int64), tl.program_id(0)
    given, row = (b * QUERIES + local) * TOPK, (b * T + FIRST + local) * TOPK
    for first in range(0, TOPK, BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < TOPK
        rank = tl.load(ranks_ptr + given + o_n, mask=m_n, other=NONE)
        token = tl.load(tokens_ptr + given + tl.load(order_ptr + given + o_n, mask=m_n, other=0), mask=m_n, other=-1)
        tl.store(indices_ptr + row + o_n, token.to(tl.int64), mask=m_n)
        tl.store(scores_ptr + row + o_n, tl.where(rank > NONE, _score_of(rank), float("-inf")), mask=m_n)


FEWEST = 1024
"""Parts of a row at least, and keys that may be collected of it."""

MOST = 8192
"""Of them at most, which are values in the registers of a program; a larger ``topk`` goes by rounds."""


def parts_of(topk: int) -> int:
    """Twice the next power of 2: of scores at random, 1.4 times ``topk`` are then expected to reach the bound."""
    parts = max(FEWEST, 2 * next_power_of_2(topk))
    return parts if parts <= MOST else 0


def select(scored: Scored, start: Tensor, end: Tensor, picked: tuple[Tensor, Tensor], first: int) -> None:
    """Fill the ranks and the tokens, int32 [B, T', topk], the tokens ascending."""
    B, queries, topk = picked[0].shape
    (scores, maxima, many), grid = scored, (queries, B)
    done = torch.zeros(B, queries, dtype=torch.int32, device=scores.device)
    row = (0 if start.shape[0] == 1 else start.shape[1], first, queries, topk, scores.shape[2])
    registers = (
        {"maxnreg": 80} if target_of(scores.device).arch == 90 and many <= 4096 else {}
    )  # three programs at once
    with on_device(scores):
        if maxima.numel():
            found = torch.empty(B, queries, many, dtype=torch.int64, device=scores.device)
            _select_kernel[grid](
                scores, maxima, start, end, *picked, found, done, *row, MANY=many, SPANS=SPANS,
                num_warps=8 if many <= 4096 else 16, **registers,
            )  # fmt: skip
        _rounds_kernel[grid](scores, start, end, *picked, done, *row, BN=2048, num_warps=8)


def sort(picked: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], first: int) -> None:
    """Fill the rows of ``outputs``, indices int64 and scores float32 [B, T, topk], from what ``select`` filled."""
    (ranks, tokens), T = picked, outputs[0].shape[1]
    B, queries, topk = ranks.shape
    ranks, order = torch.sort(ranks, dim=-1, descending=True, stable=True)  # of equal scores the first comes first
    with on_device(ranks):
        _unpack_kernel[(queries, B)](
            ranks, order, tokens, *outputs, first, queries, T, topk, BN=min(1024, max(16, next_power_of_2(topk))),
            num_warps=4,
        )  # fmt: skip
