"""The best scores of a row, by bisection or while they pass by: what the Triton routers share.

A score and its block are one int64, ordered as ``topk_keys`` orders them: by score, then by smaller block.  All are
different, so the kept ones need no order of their own until they are written.  ``kept`` is [QUERIES, KEPT], of which
slots from TOPK on are full from the start.
"""

import triton.language as tl

from kernel_index.core.triton.jit import jit

LOW = tl.constexpr(0x7FFFFFFF)
NONE = tl.constexpr(-(2**31))  # below the rank of every score
FULL = tl.constexpr(3 * 2**61)  # above every score, as −FULL is below every one
FORCED_RANK = tl.constexpr(2**62)  # above every score, and below FULL


@jit
def rank_of(score):
    """int32 of the order of float32 scores; −0 is 0, and NaN of either sign is above +∞.

    Two's complement turns float32 into an integer of its order once the bits of negative numbers are flipped.
    """
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(score != score, LOW, bits ^ ((bits >> 31) & LOW))


@jit
def reached(rank, need, least, more=0):
    """A number that ``need`` of the integers ``rank`` reach; if equal ones prevent it, the largest that more reach.

    And how many reach it.  ``least`` int64: no fewer than ``need`` reach it.  ``more``: so many more than ``need`` will
    do.
    """
    above = tl.maximum(tl.max(rank).to(tl.int64) + 1, least)  # fewer than ``need`` reach it
    count = tl.sum((rank >= least.to(rank.dtype)).to(tl.int32))
    while (count > need + more) & (above - least > 1):
        middle = (least + above) >> 1
        found = tl.sum((rank >= middle.to(rank.dtype)).to(tl.int32))
        enough = found >= need
        least, above = tl.where(enough, middle, least), tl.where(enough, above, middle)
        count = tl.where(enough, found, count)
    return least, count


@jit
def ordered(score, block):
    """Score and block as one int64."""
    return (rank_of(score).to(tl.int64) << 31) + (block ^ LOW)


@jit
def empty_slots(QUERIES: tl.constexpr, KEPT: tl.constexpr, TOPK):
    """``kept`` without a block."""
    full, o_slot = tl.full((QUERIES, KEPT), FULL, tl.int64), tl.arange(0, KEPT)[None, :]
    return tl.where(o_slot < TOPK, o_slot - full, full)


@jit
def with_forced(kept, slot, block, m_block, KEPT: tl.constexpr):
    """``kept`` with a block [QUERIES] in this slot that no score can replace, where ``m_block``."""
    forced = block.to(tl.int64) * 0 + FORCED_RANK + (block.to(tl.int32) ^ LOW)
    here = (tl.arange(0, KEPT)[None, :] == slot) & m_block[:, None]
    return tl.where(here, forced[:, None], kept)


@jit
def keep_best(kept, score, o_n, m_legal):
    """``kept`` after the scores [QUERIES, BN] of blocks ``o_n`` [BN], as far as they are legal.

    A round replaces the worst kept block of each query by the best new one.  To sort the new ones instead took longer
    on an H200: 2.9 ms for 2.5, and 19.9 for 18.2.
    """
    nothing = tl.zeros_like(score).to(tl.int64) - FULL
    found = tl.where(m_legal, ordered(score, o_n[None, :]), nothing)  # [QUERIES, BN]
    best, worst = tl.max(found, 1), tl.min(kept, 1)  # [QUERIES]
    while tl.max((best > worst).to(tl.int32), 0) > 0:
        kept = tl.where((kept == worst[:, None]) & (best > worst)[:, None], best[:, None], kept)
        found = tl.where(found == best[:, None], nothing, found)
        best, worst = tl.max(found, 1), tl.min(kept, 1)
    return kept


@jit
def store_ascending(p_indices, kept, m_q, TOPK, KEPT: tl.constexpr):
    """The kept blocks of each query in ascending order, then −1."""
    block = tl.where(kept >= KEPT - FULL, ((kept & LOW) ^ LOW).to(tl.int32), LOW)  # [QUERIES, KEPT]
    block = tl.where(tl.arange(0, KEPT)[None, :] < TOPK, block, LOW)
    for i in range(0, TOPK):
        least = tl.min(block, 1)  # [QUERIES]
        tl.store(p_indices + i, tl.where(least < LOW, least, -1), mask=m_q)
        block = tl.where(block == least[:, None], LOW, block)
