"""One launch forward; backward one launch and, for the bias, one small reduction in a fixed order.

The mask is never in memory: a program rebuilds it from the seed, one Philox call for four elements that lie 16 apart
(docs/decisions/0003-dropout-mask.md).  A tile is therefore four pieces of ``[groups, 16]`` elements, one for each word
of the calls; each run of 16 is a whole memory sector.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernel_index.gpu import ceil_div, on_device, processors

GROUPS = 32
"""Groups of 64 elements for each program of the pass over flat memory."""

COLUMN_GROUPS, ROWS = 4, 8
"""The tile of the pass that sums over rows: 8 rows of 256 columns."""


@triton.jit
def _words(group, seed):
    """The four words ``[…, 16]`` of the groups ``[…, 1]``."""
    call = group * 16 + tl.arange(0, 16)[None, :]
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0, low * 0)


@triton.jit
def _word_of(e, seed):
    """The word of each element, where elements do not come in whole groups: four times the arithmetic."""
    call = (e // 64) * 16 + e % 16
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
    j = (e // 16) % 4
    return tl.where(j == 0, w0, tl.where(j == 1, w1, tl.where(j == 2, w2, w3)))


@triton.jit
def _value(
    x_ptr, residual_ptr, bias_ptr, word, threshold, factor, start, at, size, first_column, width,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    mask = start + at < size
    y = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + (first_column + at) % width, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        r = tl.load(residual_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        if DROP:
            y = tl.where(word.to(tl.int64) >= threshold, r + y * factor, r)  # not r + 0: a dropped −0 stays −0
        else:
            y = r + y
    elif DROP:
        y = tl.where(word.to(tl.int64) >= threshold, y * factor, 0.0)
    return y


@triton.jit
def _store(out_ptr, value, start, at, size):
    tl.store(out_ptr + start + at, value.to(out_ptr.dtype.element_ty), mask=start + at < size)


@triton.jit
def _flat_kernel(
    x_ptr, residual_ptr, bias_ptr, out_ptr, seed_ptr, threshold_ptr, factor_ptr, size, width,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """out = residual + dropout(x + bias), each of residual, bias and dropout optional, over flat memory."""
    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    start = first_group * 64
    at = tl.arange(0, GROUPS)[:, None] * 64 + tl.arange(0, 16)[None, :]
    threshold = 0
    factor = 1.0
    w0 = at
    w1, w2, w3 = w0, w0, w0
    if DROP:
        threshold = tl.load(threshold_ptr)
        factor = tl.load(factor_ptr).to(tl.float32)
        w0, w1, w2, w3 = _words(first_group + tl.arange(0, GROUPS)[:, None], tl.load(seed_ptr))
    column = 0
    if BIAS:
        column = (start % width).to(tl.int32)
    y0 = _value(x_ptr, residual_ptr, bias_ptr, w0, threshold, factor, start, at, size, column, width,
                RESIDUAL, BIAS, DROP)  # fmt: skip
    y1 = _value(x_ptr, residual_ptr, bias_ptr, w1, threshold, factor, start, at + 16, size, column, width,
                RESIDUAL, BIAS, DROP)  # fmt: skip
    y2 = _value(x_ptr, residual_ptr, bias_ptr, w2, threshold, factor, start, at + 32, size, column, width,
                RESIDUAL, BIAS, DROP)  # fmt: skip
    y3 = _value(x_ptr, residual_ptr, bias_ptr, w3, threshold, factor, start, at + 48, size, column, width,
                RESIDUAL, BIAS, DROP)  # fmt: skip
    _store(out_ptr, y0, start, at, size)  # all loads are under way before the first store
    _store(out_ptr, y1, start, at + 16, size)
    _store(out_ptr, y2, start, at + 32, size)
    _store(out_ptr, y3, start, at + 48, size)


@triton.jit
def _dropped(g_ptr, dx_ptr, word, threshold, factor, row, column, rows, width, DX: tl.constexpr, DROP: tl.constexpr):
    """The gradient of x for one piece, stored if wanted."""
    mask = (row < rows) & (column < width)
    at = row * width + column
    dx = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DROP:
        dx = tl.where(word.to(tl.int64) >= threshold, dx * factor, 0.0)
    if DX:
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dx


@triton.jit
def _store_sum(parts_ptr, total, column, width, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    total = tl.sum(tl.reshape(total, (ROWS, GROUPS, 16)), 0)
    tl.store(parts_ptr + column, total, mask=column < width)


@triton.jit
def _column_kernel(
    g_ptr, dx_ptr, parts_ptr, seed_ptr, threshold_ptr, factor_ptr, rows, width, rows_per_program,
    DX: tl.constexpr, DROP: tl.constexpr, WHOLE_GROUPS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """dx, and for each run of rows the sum of dx over them: a tile is ``[ROWS · GROUPS, 16]`` for each word."""
    run = tl.program_id(0).to(tl.int64)
    first = run * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    within = tl.arange(0, ROWS * GROUPS)[:, None]
    lane = tl.arange(0, 16)[None, :]
    column = (tl.program_id(1) * GROUPS + within % GROUPS) * 64 + lane
    threshold = 0
    factor = 1.0
    seed = 0
    if DROP:
        threshold = tl.load(threshold_ptr)
        factor = tl.load(factor_ptr).to(tl.float32)
        seed = tl.load(seed_ptr)
    s0 = tl.zeros((ROWS * GROUPS, 16), tl.float32)
    s1, s2, s3 = s0, s0, s0
    for start in range(first, last, ROWS):
        row = within.to(tl.int64) // GROUPS + start
        w0 = column
        w1, w2, w3 = w0, w0, w0
        if DROP and WHOLE_GROUPS:
            w0, w1, w2, w3 = _words((row * width + tl.program_id(1) * GROUPS * 64) // 64 + within % GROUPS, seed)
        elif DROP:
            w0 = _word_of(row * width + column, seed)
            w1 = _word_of(row * width + column + 16, seed)
            w2 = _word_of(row * width + column + 32, seed)
            w3 = _word_of(row * width + column + 48, seed)
        s0 += _dropped(g_ptr, dx_ptr, w0, threshold, factor, row, column, last, width, DX, DROP)
        s1 += _dropped(g_ptr, dx_ptr, w1, threshold, factor, row, column + 16, last, width, DX, DROP)
        s2 += _dropped(g_ptr, dx_ptr, w2, threshold, factor, row, column + 32, last, width, DX, DROP)
        s3 += _dropped(g_ptr, dx_ptr, w3, threshold, factor, row, column + 48, last, width, DX, DROP)
    parts_ptr += run * width
    place = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]) * 64 + lane
    _store_sum(parts_ptr, s0, place, width, ROWS, GROUPS)
    _store_sum(parts_ptr, s1, place + 16, width, ROWS, GROUPS)
    _store_sum(parts_ptr, s2, place + 32, width, ROWS, GROUPS)
    _store_sum(parts_ptr, s3, place + 48, width, ROWS, GROUPS)


def flat(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, mask: tuple[Tensor | None, ...], out: Tensor
) -> Tensor:
    """``mask`` = (seed, threshold, factor), all None without dropout."""
    if out.numel():
        with on_device(x):
            _flat_kernel[(ceil_div(out.numel(), 64 * GROUPS),)](
                x, residual, bias, out, *mask, out.numel(), x.shape[-1] if x.ndim else 1,
                RESIDUAL=residual is not None, BIAS=bias is not None, DROP=mask[0] is not None,
                GROUPS=GROUPS, num_warps=8,
            )  # fmt: skip
    return out


def runs_of(rows: int, width: int, like: Tensor) -> int:
    """Runs of rows, and rows of the partial sums: enough for eight programs on each processor, at most 64."""
    columns = ceil_div(width, 64 * COLUMN_GROUPS)
    return max(1, min(ceil_div(rows, ROWS), 64, ceil_div(8 * processors(like), columns)))


def columns(
    g: Tensor, mask: tuple[Tensor | None, ...], dx: Tensor | None, dbias: Tensor
) -> tuple[Tensor | None, Tensor]:
    """g ``[rows, width]``; fills dx, if wanted, and dbias, summed in float32."""
    rows, width = g.shape
    if rows == 0 or width == 0:
        return dx, dbias.zero_()
    runs = runs_of(rows, width, g)
    parts = torch.empty((runs, width), dtype=torch.float32, device=g.device)
    with on_device(g):
        _column_kernel[(runs, ceil_div(width, 64 * COLUMN_GROUPS))](
            g, dx, parts, *mask, rows, width, ROWS * ceil_div(rows, ROWS * runs),
            DX=dx is not None, DROP=mask[0] is not None, WHOLE_GROUPS=width % 64 == 0,
            ROWS=ROWS, GROUPS=COLUMN_GROUPS, num_warps=4,
        )  # fmt: skip
    torch.sum(parts, 0, out=dbias)
    return dx, dbias
