"""Device functions that share the keys of ragged batch rows out among programs, from the lengths that they find.

A row has as many splits as its share of all keys asks for, at least one.  Splits are numbered row after row.
"""

import triton.language as tl

from kernel_index.core.triton.jit import jit


@jit
def seen_keys(length_ptr, o_b, BATCH, NEW, REACH):
    """How many keys the queries of batch rows ``o_b`` see; 0 where there is no such row."""
    length = tl.load(length_ptr + o_b, mask=o_b < BATCH, other=0).to(tl.int32) + NEW
    return tl.where(o_b < BATCH, tl.minimum(length, REACH), 0)


@jit
def ideal_split(length_ptr, BATCH, NEW, REACH, SHARES, PROGRAMS, SMALLEST: tl.constexpr, N: tl.constexpr):
    """Keys of a split with which all programs walk over as many keys, where each batch row is walked SHARES times."""
    total = 0.0
    for first in range(0, BATCH, N):
        total += tl.sum(seen_keys(length_ptr, first + tl.arange(0, N), BATCH, NEW, REACH).to(tl.float32), 0)
    return tl.maximum(tl.ceil(total * SHARES / PROGRAMS).to(tl.int32), SMALLEST)


@jit
def splits_of(seen, ideal, MOST):
    """In how many splits ``seen`` keys are walked over."""
    return tl.minimum(tl.maximum((seen + ideal // 2) // ideal, 1), MOST)


@jit
def splits_before(length_ptr, b, BATCH, NEW, REACH, ideal, MOST, N: tl.constexpr):
    """The number of splits of the batch rows before ``b``: where the states of its own begin."""
    before = 0
    for first in range(0, BATCH, N):
        o_b = first + tl.arange(0, N)
        splits = splits_of(seen_keys(length_ptr, o_b, BATCH, NEW, REACH), ideal, MOST)
        before += tl.sum(tl.where(o_b < b, splits, 0), 0)
    return before


@jit
def batch_row(length_ptr, slot, BATCH, NEW, REACH, ideal, MOST, N: tl.constexpr):
    """The batch row that split number ``slot`` belongs to, BATCH where there is none, and the number of its first."""
    b, before, total = 0, 0, 0
    for first in range(0, BATCH, N):
        o_b = first + tl.arange(0, N)
        splits = splits_of(seen_keys(length_ptr, o_b, BATCH, NEW, REACH), ideal, MOST)
        ends = total + tl.cumsum(tl.where(o_b < BATCH, splits, 0), 0)
        m_over = (ends <= slot) & (o_b < BATCH)
        b += tl.sum(m_over.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(m_over, ends, 0), 0))
        total = tl.max(ends, 0)
    return b, before
