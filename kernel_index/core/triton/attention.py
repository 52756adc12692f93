"""Device functions that the attention kernels share: products, roundings, tiles of rows, what an interval visits."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Round to nearest, ties to even, as GPUs do; Triton's interpreter would cut bfloat16 off."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def tanh(x):
    size = tl.abs(x)
    e = tl.exp2(size * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    small = x * (1.0 - s * (0.33333333 - s * (0.13333333 - s * (0.053968254 - s * 0.021869488))))
    return tl.where(size < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def pointers(base, first, row_stride, ROWS, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to N rows of a matrix with dense columns, and which exist; only the first row's offset is wide."""
    row, column = tl.arange(0, N), tl.arange(0, BLOCK_D)
    exists = first + row < ROWS
    inside = exists[:, None] & (column < D)[None, :] if D < BLOCK_D else tl.broadcast_to(exists[:, None], N, BLOCK_D)
    return base + tl.cast(first, tl.int64) * row_stride + (row[:, None] * row_stride + column[None, :]), inside


@triton.jit
def load_tile(base, first, row_stride, ROWS, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    at, inside = pointers(base, first, row_stride, ROWS, N, D, BLOCK_D)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(
    base, first, row_stride, value, ROWS,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    at, inside = pointers(base, first, row_stride, ROWS, N, D, BLOCK_D)
    tl.store(at, narrow(value, base.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def plan_steps(start_ptr, end_ptr, first, ROWS, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """What ``BLOCK`` rows visit, in steps: from ``low`` on, ``left`` masked, ``full`` unmasked, ``right`` masked.

    Both ends of the intervals never decrease, so the first and the last row decide.
    """
    last = tl.minimum(first + BLOCK, ROWS) - 1
    low = tl.load(start_ptr + first) // STEP
    high = tl.cdiv(tl.load(end_ptr + last), STEP)
    full_low = tl.minimum(tl.maximum(tl.cdiv(tl.load(start_ptr + last), STEP), low), high)
    full_high = tl.maximum(tl.load(end_ptr + first) // STEP, full_low)
    return low, full_low - low, full_high - full_low, tl.maximum(high - full_high, 0)


@triton.jit
def masked_step(i, low, left, full, STEP: tl.constexpr):
    """Where the i-th masked step begins: the steps on the left, then those on the right of the full ones."""
    return (low + i + tl.where(i < left, 0, full)) * STEP


@triton.jit
def load_rows(base, offset, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows that begin ``offset`` elements, 64 bits wide, behind ``base``; zeros where none exists."""
    column = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (column < D)[None, :] if D < BLOCK_D else exists[:, None]
    return tl.load(base + (offset[:, None] + column[None, :]), mask=inside, other=0.0)


@triton.jit
def store_rows(base, offset, exists, value, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (column < D)[None, :] if D < BLOCK_D else exists[:, None]
    value = narrow(value, base.dtype.element_ty, UPCAST)
    tl.store(base + (offset[:, None] + column[None, :]), value, mask=inside)


@triton.jit
def count_below(list_ptr, size, a, b, c, d, CHUNK: tl.constexpr):
    """How many of the first ``size`` entries are below each of four limits."""
    below_a, below_b, below_c, below_d = 0, 0, 0, 0
    for at in range(0, size, CHUNK):
        place = at + tl.arange(0, CHUNK)
        entry = tl.load(list_ptr + place, mask=place < size, other=2**31 - 1)
        below_a += tl.sum((entry < a).to(tl.int32), 0)
        below_b += tl.sum((entry < b).to(tl.int32), 0)
        below_c += tl.sum((entry < c).to(tl.int32), 0)
        below_d += tl.sum((entry < d).to(tl.int32), 0)
    return below_a, below_b, below_c, below_d


@triton.jit
def union_visits(list_ptr, start_ptr, end_ptr, size, first, ROWS, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Which places of an ascending list of key blocks ``QUERIES`` rows visit: ``begin ≤ place < stop``.

    Those with ``whole ≤ place < cease`` are allowed to all of the rows.
    """
    low, left, full, right = plan_steps(start_ptr, end_ptr, first, ROWS, QUERIES, BLOCK)
    left += low
    full += left
    return count_below(list_ptr, size, low, left, full, full + right, 128)
