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
    scores_ptr, maxima_ptr, start_ptr, end_ptr, keys_ptr, found_ptr, done_ptr, bound_b, FIRST, QUERIES, TOPK, ROW,
    BN: tl.constexpr, MANY: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The keys of the best TOPK scores of a query that may see more, int64 in the order of their indices.

    ``done``: whether they are stored, which they are not where more than MANY keys reach the bound.
    """
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    p_row, p_keys, p_found = scores_ptr + row * ROW, keys_ptr + row * TOPK, found_ptr + row * MANY
    is_done = start * 0
    if end - start > TOPK:
        rows = tl.num_programs(1).to(tl.int64) * QUERIES
        bound = _bound(maxima_ptr + row * MANY, start, end, TOPK, rows, ROW, MANY, SPAN)
        count = _collect(p_row, p_found, start, end, bound, ROW, MANY, BN)
        if count <= MANY:
            tl.debug_barrier()  # other threads of the program have stored some of them
            o_found = tl.arange(0, MANY)
            keys = tl.load(p_found + o_found, mask=o_found < count, other=NOTHING)
            least, _ = reached(keys, TOPK, bound << 31)
            m_take = keys >= least
            tl.store(p_keys + tl.cumsum(m_take.to(tl.int32), 0) - 1, keys, mask=m_take)
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
    scores_ptr, start_ptr, end_ptr, keys_ptr, done_ptr, bound_b, FIRST, QUERIES, TOPK, ROW, BN: tl.constexpr
):
    """The keys of the best TOPK scores of a query, if they are not stored yet; then ``NOTHING``."""
    row, start, end = _row(start_ptr, end_ptr, bound_b, FIRST, QUERIES)
    if tl.load(done_ptr + row) != 0:
        return
    p_row, p_keys = scores_ptr + row * ROW, keys_ptr + row * TOPK
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
        tl.store(p_keys + slot, (rank.to(tl.int64) << 31) + (o_n ^ LOW), mask=m_take)
        seen += tl.sum(m_equal.to(tl.int32), 0)
        taken += tl.sum(m_take.to(tl.int32), 0)
    for first in range(taken, TOPK, BN):
        o_n = first + tl.arange(0, BN)
        tl.store(p_keys + o_n, tl.full((BN,), NOTHING, tl.int64), mask=o_n < TOPK)


@jit
def _unpack(p_indices, p_scores, key, o_n, m_n):
    """Store index and score of each key; −1 and −∞ where there is none."""
    rank = (key >> 31).to(tl.int32)
    score = (rank ^ ((rank >> 31) & LOW)).to(tl.float32, bitcast=True)
    tl.store(p_indices + o_n, tl.where(key > NOTHING, (key & LOW) ^ LOW, -1), mask=m_n)
    tl.store(p_scores + o_n, tl.where(key > NOTHING, score, float("-inf")), mask=m_n)


@jit
def _unpack_kernel(keys_ptr, indices_ptr, scores_ptr, FIRST, QUERIES, T, TOPK, BN: tl.constexpr):
    """The keys of one query, in the order in which they are."""
    b, local = tl.program_id(1).to(tl.int64), tl.program_id(0)
    p_keys, row = keys_ptr + (b * QUERIES + local) * TOPK, (b * T + FIRST + local) * TOPK
    for first in range(0, TOPK, BN):
        o_n = first + tl.arange(0, BN)
        key = tl.load(p_keys + o_n, mask=o_n < TOPK, other=NOTHING)
        _unpack(indices_ptr + row, scores_ptr + row, key, o_n, o_n < TOPK)


@jit
def _sort_kernel(keys_ptr, indices_ptr, scores_ptr, FIRST, QUERIES, T, TOPK, BN: tl.constexpr):
    """The keys of one query, at most BN, the largest first."""
    b, local, o_n = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, BN)
    key = tl.load(keys_ptr + (b * QUERIES + local) * TOPK + o_n, mask=o_n < TOPK, other=NOTHING)
    row = (b * T + FIRST + local) * TOPK
    _unpack(indices_ptr + row, scores_ptr + row, tl.sort(key, descending=True), o_n, o_n < TOPK)


FEWEST = 1024
"""Parts of a row at least, and keys that may be collected of it."""

MOST = 8192
"""Of them at most, which are values in the registers of a program; a larger ``topk`` goes by rounds."""

MOST_SORTED = 4096
"""Keys of a query that one program sorts; PyTorch sorts more."""


def parts_of(topk: int) -> int:
    """Twice the next power of 2: of scores at random, 1.4 times ``topk`` are then expected to reach the bound."""
    parts = max(FEWEST, 2 * next_power_of_2(topk))
    return parts if parts <= MOST else 0


def select(scored: Scored, start: Tensor, end: Tensor, keys: Tensor, first: int) -> None:
    """Fill ``keys`` int64 [B, T', topk]."""
    B, queries, topk = keys.shape
    (scores, maxima, many), grid = scored, (queries, B)
    done = torch.zeros(B, queries, dtype=torch.int32, device=keys.device)
    row = (0 if start.shape[0] == 1 else start.shape[1], first, queries, topk, scores.shape[2])
    registers = {"maxnreg": 80} if target_of(keys.device).arch == 90 and many <= 4096 else {}  # three programs at once
    with on_device(keys):
        if maxima.numel():
            found = torch.empty(B, queries, many, dtype=torch.int64, device=keys.device)
            _select_kernel[grid](
                scores, maxima, start, end, keys, found, done, *row, BN=2048, MANY=many, SPAN=SPANS * many,
                num_warps=8 if many <= 4096 else 16, **registers,
            )  # fmt: skip
        _rounds_kernel[grid](scores, start, end, keys, done, *row, BN=2048, num_warps=8)


def sort(keys: Tensor, outputs: tuple[Tensor, Tensor], first: int) -> None:
    """Fill the rows of ``outputs``, indices int64 and scores float32 [B, T, topk], from keys [B, T', topk]."""
    (B, queries, topk), T = keys.shape, outputs[0].shape[1]
    block = max(16, next_power_of_2(topk))
    with on_device(keys):
        if topk <= MOST_SORTED:
            _sort_kernel[(queries, B)](
                keys, *outputs, first, queries, T, topk, BN=block, num_warps=8 if block > 1024 else 4
            )
        else:
            keys = keys.sort(-1, descending=True).values
            _unpack_kernel[(queries, B)](keys, *outputs, first, queries, T, topk, BN=1024, num_warps=4)
