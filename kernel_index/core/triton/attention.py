"""Device functions of the attention kernels: loads, products, scores, online softmax and its gradient, window tiles.

Names in all kernels: ``x_ptr`` is a pointer that the host passes and ``x_b, x_t, x_h`` its strides of batch, token and
head; ``p_x`` is a pointer moved by the kernel, ``o_x`` an offset or index, ``m_x`` a mask, ``b_x`` a block loaded from
memory; a computed value has its formula's name (z, p, alpha, dq).  A comment gives the shape of a block: BM rows
(queries × heads) of a tile, BN keys, BLOCK_D and BLOCK_DV columns of keys and of values; N rows of either side.

A walk over tiles takes a weight of 0 for what a mask excludes.  Where its sums have a NaN it runs again with
``CAREFUL``, so that only rows that see a value that is not finite become NaN (docs/decisions/0015).

Scores ``z`` are q·k, or tanh(inner · q·k) with a softcap.  Logits are ``outer · z`` of base 2, since ``outer`` carries
log2(e); so are exponentials, ``row_max`` and ``lse``.
"""

import triton.language as tl

from kernel_index.core.triton.jit import jit

LOG2E = tl.constexpr(1.4426950408889634)

OUTGROWN = tl.constexpr(-(2**31))
"""In place of a selection: there was no memory for it, and the output of that query is NaN."""


@jit
def dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Round to nearest, ties to even, as GPUs do; Triton's interpreter would cut bfloat16 off."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@jit
def tanh(x):
    size = tl.abs(x)
    e = tl.exp2(size * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    small = x * (1.0 - s * (0.33333333 - s * (0.13333333 - s * (0.053968254 - s * 0.021869488))))
    return tl.where(size < 0.25, small, tl.where(x < 0, -large, large))


@jit
def tile_pointers(p_base, first, row_stride, ROWS, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows ``first`` to ``first + N`` of a matrix with dense columns, and which of them exist.

    Only the first row's offset is computed in 64 bits.
    """
    o_n, o_d = tl.arange(0, N), tl.arange(0, BLOCK_D)
    m_n = first + o_n < ROWS  # [N]
    m_tile = m_n[:, None] & (o_d < D)[None, :] if D < BLOCK_D else tl.broadcast_to(m_n[:, None], N, BLOCK_D)
    p_tile = p_base + tl.cast(first, tl.int64) * row_stride + (o_n[:, None] * row_stride + o_d[None, :])
    return p_tile, m_tile  # [N, BLOCK_D]


@jit
def load_tile(p_base, first, row_stride, ROWS, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """N consecutive rows [N, BLOCK_D]; zeros where none exists."""
    p_tile, m_tile = tile_pointers(p_base, first, row_stride, ROWS, N, D, BLOCK_D)
    return tl.load(p_tile, mask=m_tile, other=0.0)


@jit
def store_tile(
    p_base, first, row_stride, value, ROWS,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    p_tile, m_tile = tile_pointers(p_base, first, row_stride, ROWS, N, D, BLOCK_D)
    tl.store(p_tile, narrow(value, p_base.dtype.element_ty, UPCAST), mask=m_tile)


@jit
def load_rows(p_base, o_n, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [N, BLOCK_D] that begin ``o_n`` elements, of 64 bits, after ``p_base``; zeros where ``m_n`` is false."""
    o_d = tl.arange(0, BLOCK_D)
    m_rows = m_n[:, None] & (o_d < D)[None, :] if D < BLOCK_D else m_n[:, None]
    return tl.load(p_base + (o_n[:, None] + o_d[None, :]), mask=m_rows, other=0.0)


@jit
def store_rows(p_base, o_n, m_n, value, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m_rows = m_n[:, None] & (o_d < D)[None, :] if D < BLOCK_D else m_n[:, None]
    value = narrow(value, p_base.dtype.element_ty, UPCAST)
    tl.store(p_base + (o_n[:, None] + o_d[None, :]), value, mask=m_rows)


@jit
def cache_slots(table_ptr, b, table_b, table_s, o_k, m_k, PAGE: tl.constexpr, PAGED: tl.constexpr):
    """The page (without pages: the batch row) and the slot in it of tokens ``o_k`` of a KV cache, in 64 bits [BN]."""
    if PAGED:
        b_page = tl.load(table_ptr + b * table_b + (o_k // PAGE) * table_s, mask=m_k, other=0).to(tl.int64)
        o_slot = o_k % PAGE
    else:
        b_page = tl.zeros_like(o_k).to(tl.int64) + b
        o_slot = o_k
    return b_page, o_slot.to(tl.int64)


@jit
def within(index, start, end):
    return (index >= start) & (index < end)


@jit
def softcapped(z, inner, CAPPED: tl.constexpr):
    return tanh(z * inner) if CAPPED else z


@jit
def scores(b_q, b_k, inner, CAPPED: tl.constexpr, UPCAST: tl.constexpr):
    """z = q·kᵀ [BM, BN] of rows [BM, BLOCK_D] and [BN, BLOCK_D], through the softcap's tanh."""
    return softcapped(dot(b_q, tl.trans(b_k), UPCAST), inner, CAPPED)


@jit
def finite_max(row_max):
    """What logits are reduced by: a row without keys has a maximum of −∞, and −∞ − (−∞) would be NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@jit
def online_softmax(logits, row_max, row_sum):
    """One step of the online softmax over ``logits`` [BM, BN], −∞ where masked.

    Returns the probabilities p [BM, BN] relative to the new ``row_max``, the factor ``alpha`` [BM] by which sums over
    earlier keys shrink, and the new ``row_max`` and ``row_sum`` [BM].
    """
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    shift = finite_max(new_max)
    p = tl.exp2(logits - shift[:, None])
    alpha = tl.exp2(row_max - shift)
    return p, alpha, new_max, row_sum * alpha + tl.sum(p, 1)


@jit
def weighted_sum(w, b_x, m_seen, CAREFUL: tl.constexpr, UPCAST: tl.constexpr):
    """w·x [BM, BLOCK_D] of weights [BM, BN] and rows x [BN, BLOCK_D].

    The weights are rounded to the dtype of x, the sum is float32.  A weight of 0 does not hide a row that is not
    finite, since 0 · NaN is NaN.  With ``CAREFUL`` such a row reaches only the rows that see it, ``m_seen`` [BM, BN]:
    they become NaN, all others have the bits that finite values give.
    """
    if CAREFUL:
        flag = tl.sum(b_x.to(tl.float32) * 0.0, 1)  # [BN]: NaN where a row of x is not finite, else 0
        w = tl.where(m_seen, w + flag[None, :], 0.0)
        b_x = tl.where((flag == 0.0)[:, None], b_x, 0.0)
    return dot(narrow(w, b_x.dtype, UPCAST), b_x, UPCAST)


@jit
def has_nan(x):
    """Whether a sum must be made again with ``CAREFUL``: 0 · x is NaN where x is not finite, and NaN stays in a sum."""
    return tl.max((x != x).to(tl.int32)) == 1


@jit
def merge_states(acc, row_max, row_sum, b_acc, b_max, b_sum):
    """The softmax state over two disjoint sets of keys: ``acc`` [BM, BLOCK_DV], ``row_max`` and ``row_sum`` [BM]."""
    new_max = tl.maximum(row_max, b_max)
    shift = finite_max(new_max)
    alpha, beta = tl.exp2(row_max - shift), tl.exp2(b_max - shift)
    return acc * alpha[:, None] + b_acc * beta[:, None], new_max, row_sum * alpha + b_sum * beta


@jit
def softmax_output(acc, row_max, row_sum, m_empty):
    """The output [BM, BLOCK_DV] and ``lse`` [BM] of a state; 0 and −∞ where ``m_empty``: for rows without keys."""
    row_sum = tl.where(m_empty, 1.0, row_sum)
    return acc / row_sum[:, None], tl.where(m_empty, float("-inf"), row_max + tl.log2(row_sum))


@jit
def with_sink(acc, row_max, row_sum, sink):
    """The state of a softmax with one key more, of logit ``sink`` [BM] in units of log2 and without a value."""
    new_max = tl.maximum(row_max, sink)
    shift = finite_max(new_max)
    alpha = tl.exp2(row_max - shift)
    return acc * alpha[:, None], new_max, row_sum * alpha + tl.exp2(sink - shift)


@jit
def score_grad(z, p, dp, delta, CAPPED: tl.constexpr):
    """dz = p · (dp − delta), times the slope 1 − z² of the softcap's tanh.

    ``dp`` is the gradient of p; ``delta`` = Σ d_out · out − d_lse is broadcast over the keys.
    """
    dz = p * (dp - delta)
    if CAPPED:
        dz = dz * (1.0 - z * z)
    return dz


@jit
def lse_of_grad(lse, m_some):
    """``lse`` for the backward pass: rows without keys get +∞, so exp2(logits − lse) = 0 and they have no gradient."""
    return tl.where(m_some, lse, float("inf"))


@jit
def window_tiles(start_ptr, end_ptr, first, ROWS, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The tiles of STEP that BLOCK rows visit: from ``low`` on, ``left`` masked, ``full`` and ``right`` masked ones.

    Full tiles are inside the window of every row.  Window bounds never decrease, so the first and the last row
    decide.
    """
    last = tl.minimum(first + BLOCK, ROWS) - 1
    low = tl.load(start_ptr + first) // STEP
    high = tl.cdiv(tl.load(end_ptr + last), STEP)
    full_low = tl.minimum(tl.maximum(tl.cdiv(tl.load(start_ptr + last), STEP), low), high)
    full_high = tl.maximum(tl.load(end_ptr + first) // STEP, full_low)
    return low, full_low - low, full_high - full_low, tl.maximum(high - full_high, 0)


@jit
def listed_tiles(list_ptr):
    """The same for the tiles of a list: full ones are numbers 0 to ``full``, masked ones 0 to ``right``."""
    zero = tl.load(list_ptr) * 0
    return zero, zero, tl.load(list_ptr), tl.load(list_ptr + 1)


@jit
def full_tile(i, low, left, list_ptr, STEP: tl.constexpr, LISTED: tl.constexpr):
    """First row of the i-th full tile."""
    if LISTED:
        return tl.load(list_ptr + 2 + i) * STEP
    return (low + left + i) * STEP


@jit
def masked_tile(i, low, left, full, list_ptr, tiles, STEP: tl.constexpr, LISTED: tl.constexpr):
    """First row of the i-th masked tile: those on the left, then those on the right of the full ones.

    A list has ``tiles`` places for full tiles before those for masked ones.
    """
    if LISTED:
        return tl.load(list_ptr + 2 + tiles + i) * STEP
    return (low + i + tl.where(i < left, 0, full)) * STEP


@jit
def count_below(list_ptr, size, a, b, c, d, CHUNK: tl.constexpr):
    """How many of the first ``size`` entries are below each of four limits."""
    below_a, below_b, below_c, below_d = 0, 0, 0, 0
    for begin in range(0, size, CHUNK):
        o_entry = begin + tl.arange(0, CHUNK)
        b_entry = tl.load(list_ptr + o_entry, mask=o_entry < size, other=2**31 - 1)  # [CHUNK]
        below_a += tl.sum((b_entry < a).to(tl.int32), 0)
        below_b += tl.sum((b_entry < b).to(tl.int32), 0)
        below_c += tl.sum((b_entry < c).to(tl.int32), 0)
        below_d += tl.sum((b_entry < d).to(tl.int32), 0)
    return below_a, below_b, below_c, below_d


@jit
def union_visits(list_ptr, start_ptr, end_ptr, size, first, ROWS, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """The slots ``begin ≤ slot < stop`` that ``QUERIES`` rows visit in an ascending list of key blocks.

    Blocks at ``full_begin ≤ slot < full_stop`` are inside the window of every row.
    """
    low, left, full, right = window_tiles(start_ptr, end_ptr, first, ROWS, QUERIES, BLOCK)
    left += low
    full += left
    begin, full_begin, full_stop, stop = count_below(list_ptr, size, low, left, full, full + right, 128)
    return begin, full_begin, full_stop, stop
