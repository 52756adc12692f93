"""The best keys of each row of the indexer's scores, on a GPU.

A sample of a row bounds its best scores: about ``topk · parts`` keys, squared, reach the bound.  One pass over the row
collects these keys in order, and the best ``topk`` of them are found in registers.  Where fewer than ``topk`` reach the
bound, or more than there is space for, the maxima of ``parts`` parts of the row give another bound, which ``topk`` keys
reach for certain.

Where still too many reach it, four rounds over the row count how many have each value of the next eight bits, and leave
the score at which ``topk`` are reached; a last one takes those above it, and of those equal to it the first.  Either
way tokens stand in ascending order, so that a stable sort of their ranks, 32 bits, is all that is left.
"""

import math

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device
from kernel_index.routing.triton_topk import LOW, NONE, rank_of, reached

LEAST, LARGEST = tl.constexpr(-0x7F800001), tl.constexpr(0x7F800000)
"""The ranks of −∞ and ∞."""

STAGES = tl.constexpr(4)
"""Tiles of a row that are on their way at once."""

PIECE = tl.constexpr(8)
"""Neighbouring keys of a sample: what the memory delivers at least."""

LANE = tl.constexpr(32)
"""Keys whose sums stay within a warp."""


@jit
def _score_of(rank):
    """The score of a rank."""
    return (rank ^ ((rank >> 31) & LOW)).to(tl.float32, bitcast=True)


@jit
def _ranks(p_row, o_n, start, end, ROW):
    """Of the keys from start to end, else NONE: the scores of others may never have been stored."""
    return tl.where(within(o_n, start, end), rank_of(tl.load(p_row + o_n, mask=o_n < ROW, other=0.0)), NONE)


@jit
def _sampled_bound(p_row, start, end, WANTED, ROW, MANY: tl.constexpr):
    """A rank, int64, that about WANTED keys reach by a sample of MANY."""
    o_s = tl.arange(0, MANY)
    period = tl.cdiv(tl.cdiv(end - start, MANY // PIECE), PIECE) * PIECE
    o_n = start // PIECE * PIECE + o_s // PIECE * period + o_s % PIECE
    rank = _ranks(p_row, o_n, start, end, ROW)
    need = tl.maximum(WANTED * tl.sum((rank != NONE).to(tl.int32), 0) // (end - start), 1)
    bound, _ = reached(rank, need, tl.cast(NONE + 1, tl.int64), need // 16)
    return bound


@jit
def _certain_bound(p_row, start, end, need, ROW, MANY: tl.constexpr):
    """A rank, int64, that ``need`` keys reach and hardly more do: in ``need`` of MANY parts of the row there is one."""
    best = tl.full((MANY,), NONE, tl.int32)
    for first in tl.range(start // MANY * MANY, end, MANY, num_stages=STAGES):
        best = tl.maximum(best, _ranks(p_row, first + tl.arange(0, MANY), start, end, ROW))
    bound, _ = reached(best, need, tl.cast(NONE + 1, tl.int64))
    return bound


@jit
def _ones(x):
    """How many bits of x, uint32, are set; compilers know this sequence as one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@jit
def _places(m, count):
    """Where the elements of m [WORDS, LANE] that are set stand, row after row, if ``count`` do before; and the count
    with them.  A row is the bits of a word, so that no sum of numbers goes from thread to thread."""
    o_bit = tl.arange(0, LANE).to(tl.uint32)[None, :]
    bit = tl.full((1, LANE), 1, tl.uint32) << o_bit
    word = tl.sum(tl.where(m, bit, 0), 1)  # [WORDS]
    ones = _ones(word)
    before = count + tl.cumsum(ones, 0) - ones
    return before[:, None] + _ones(word[:, None] & (bit - 1)), count + tl.sum(ones, 0)


@jit
def _collect(p_row, p_found, start, end, bound, ROW, MANY: tl.constexpr, BN: tl.constexpr):
    """Store the keys that reach the bound, score and token in 64 bits; return how many there are.

    Of more than MANY some are lost.  Scores are compared as they are: to rank all of them would take longer.  NaN is
    not below any bound.
    """
    least = _score_of(tl.minimum(tl.maximum(bound.to(tl.int32), LEAST), LARGEST))
    o_tile = tl.arange(0, BN // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]  # [BN / LANE, LANE]
    count = start * 0
    for first in tl.range(start // BN * BN, end, BN, num_stages=STAGES):
        o_n = first + o_tile
        score = tl.load(p_row + o_n, mask=o_n < ROW, other=0.0)
        m_found = within(o_n, start, end) & ~(score < least)
        slot, count = _places(m_found, tl.minimum(count, MANY + 1))
        key = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_n.to(tl.int64)
        tl.store(p_found + slot, key, mask=m_found)
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
    scores_ptr, start_ptr, end_ptr, best_ptr, tokens_ptr, found_ptr, done_ptr, bound_b, FIRST, QUERIES, TOPK, ROW,
    WANTED, BN: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The best TOPK tokens of a query that may see more, ascending, and the ranks of their scores.

    ``done``: whether they are stored, which they are not where more than MANY keys reach the bound.
    """
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    p_row, p_found = scores_ptr + row * ROW, found_ptr + row * (MANY + 1 + BN)
    is_done = start * 0
    if end - start > TOPK:
        bound = tl.cast(NONE + 1, tl.int64)
        if end - start > MANY:
            bound = _sampled_bound(p_row, start, end, WANTED, ROW, MANY)
        count = _collect(p_row, p_found, start, end, bound, ROW, MANY, BN)
        if (count < TOPK) | (count > MANY):
            bound = _certain_bound(p_row, start, end, TOPK, ROW, MANY)
            tl.debug_barrier()  # other threads of the program may still store
            count = _collect(p_row, p_found, start, end, bound, ROW, MANY, BN)
        if count <= MANY:
            tl.debug_barrier()  # other threads of the program have stored some of them
            o_found = tl.arange(0, MANY // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
            key = tl.load(p_found + o_found, mask=o_found < count, other=0)
            rank = tl.where(o_found < count, rank_of((key >> 32).to(tl.int32).to(tl.float32, bitcast=True)), NONE)
            _take(rank, key.to(tl.int32), bound, best_ptr + row * TOPK, tokens_ptr + row * TOPK, TOPK)
            is_done += 1
    tl.store(done_ptr + row, is_done)


@jit
def _take(rank, token, bound, p_best, p_tokens, TOPK):
    """Store the best TOPK tokens, of equal ones the first, in their order."""
    least, _ = reached(rank, TOPK, bound)
    least = least.to(tl.int32)
    m_above, m_equal = rank > least, rank == least
    equal = TOPK - tl.sum(m_above.to(tl.int32))
    before, _ = _places(m_equal, 0)
    m_take = m_above | (m_equal & (before < equal))
    slot, _ = _places(m_take, 0)
    tl.store(p_best + slot, rank, mask=m_take)
    tl.store(p_tokens + slot, token, mask=m_take)


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
    scores_ptr, start_ptr, end_ptr, best_ptr, tokens_ptr, done_ptr, bound_b, FIRST, QUERIES, TOPK, ROW,
    BN: tl.constexpr,
):  # fmt: skip
    """The best TOPK tokens of a query and their ranks, if they are not stored yet; then −1 and ``NONE``."""
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    if tl.load(done_ptr + row) != 0:
        return
    p_row, p_best, p_tokens = scores_ptr + row * ROW, best_ptr + row * TOPK, tokens_ptr + row * TOPK
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
        tl.store(indices_ptr + row + o_n, token.to(tl.int64), mask=m_n)
        tl.store(scores_ptr + row + o_n, tl.where(rank > NONE, _score_of(rank), float("-inf")), mask=m_n)


FEWEST = 2048
"""Keys of a sample at least, parts of a row, and keys that may be collected of it."""

MOST = 8192
"""Of them at most, which are values in the registers of a program; a larger ``topk`` goes by rounds."""


def parts_of(topk: int) -> int:
    """Twice the next power of 2: so the parts of a row bound 1.4 times ``topk`` of scores at random."""
    parts = max(FEWEST, 2 * next_power_of_2(topk))
    return parts if parts <= MOST else 0


def select(scores: Tensor, start: Tensor, end: Tensor, picked: tuple[Tensor, Tensor], first: int) -> None:
    """Fill ranks and tokens int32 [B, T', topk], the tokens ascending."""
    B, queries, topk = picked[0].shape
    many, grid = parts_of(topk), (queries, B)
    done = torch.zeros(B, queries, dtype=torch.int32, device=scores.device)
    row = (0 if start.shape[0] == 1 else start.shape[1], first, queries, topk, scores.shape[2])
    options = select_options(many, target_of(scores.device))
    with on_device(scores):
        if many:
            found = torch.empty(B, queries, many + 1 + options["BN"], dtype=torch.int64, device=scores.device)
            _select_kernel[grid](
                scores, start, end, *picked, found, done, *row, math.isqrt(topk * many), MANY=many, **options
            )
        _rounds_kernel[grid](scores, start, end, *picked, done, *row, BN=2048, num_warps=8)


def select_options(many: int, target: Target) -> dict[str, int]:
    """Keys of a step, warps, and registers of a thread at most: then four programs share an NVIDIA multiprocessor."""
    if many > 4096:
        return {"BN": 2048, "num_warps": 16}
    return {"BN": 1024, "num_warps": 4, **({"maxnreg": 128} if target.arch == 90 else {})}


def unpack(picked: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], first: int) -> None:
    """Fill the rows of ``outputs``, indices int64 and scores float32 [B, T, topk], best first."""
    (ranks, tokens), T = picked, outputs[0].shape[1]
    B, queries, topk = ranks.shape
    ranks, order = torch.sort(ranks, dim=-1, descending=True, stable=True)  # of equal scores the first comes first
    with on_device(ranks):
        _unpack_kernel[(queries, B)](
            ranks, order, tokens, *outputs, first, queries, T, topk, BN=min(1024, max(16, next_power_of_2(topk))),
            num_warps=4,
        )  # fmt: skip
