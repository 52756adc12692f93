"""Backward for few wide rows: the mean of each row, then all rows by blocks of columns, without partial sums.

A program for each row would write its own float32 row of the weight's gradient, as many bytes as all else together.
Here a program of the second launch has a block of columns of every row, and so their whole sum; it reads what the first
one has brought into the L2 cache.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device
from kernel_index.core.triton.row import load_row, store_row
from kernel_index.core.triton.sums import dependent

FEW, WIDE = 128, 4096
"""Rows at most and columns at least.

On an H200 128 rows of 16384 took 8.5 µs for 13.6, of 4096 4.9 for 5.7, of 1024 3.8 for 3.2.
"""

BLOCK, COLUMNS = 4096, 64
"""Of a row in a program of the first launch, and of all rows in one of the second: the fastest tried there."""


@jit
def norm_grad(x, dy, w, rstd, mean):
    """dx of x · rstd · w; ``mean`` is that of dy · w · x · rstd over the row."""
    return rstd * (dy * w - x * rstd * mean)


@jit
def _means_kernel(
    d_normed_ptr, new_ptr, rstd_ptr, weight_ptr, means_ptr, width, offset, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """The part of a row's mean that a block of its columns is."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_d = o_d < width
    dy = load_row(d_normed_ptr + row * width, o_d, m_d)
    x_hat = load_row(new_ptr + row * width, o_d, m_d) * tl.load(rstd_ptr + row)
    mean = tl.sum(dy * (load_row(weight_ptr, o_d, m_d) + offset) * x_hat, 0) / width
    tl.store(means_ptr + row * tl.num_programs(1) + tl.program_id(1), mean)


@jit
def _columns_kernel(
    d_new_ptr, d_normed_ptr, new_ptr, rstd_ptr, weight_ptr, means_ptr, d_residual_ptr, d_delta_ptr, d_weight_ptr,
    rows, width, parts, offset,
    HAS_NEW: tl.constexpr, RESIDUAL: tl.constexpr, DELTA: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    o_r = tl.arange(0, ROWS).to(tl.int64)[:, None]  # [ROWS, 1]
    o_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    o_p = tl.arange(0, PARTS)[None, :]  # [1, PARTS]
    m_r, m_d = o_r < rows, o_d < width
    m, o_rd = m_r & m_d, o_r * width + o_d
    w = load_row(weight_ptr, o_d, m_d) + offset
    x = load_row(new_ptr, o_rd, m)  # [ROWS, COLUMNS]
    dy = load_row(d_normed_ptr, o_rd, m)  # [ROWS, COLUMNS]
    dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_NEW:
        dx = load_row(d_new_ptr, o_rd, m)  # [ROWS, COLUMNS]
    rstd = tl.load(rstd_ptr + o_r, mask=m_r, other=0.0)  # [ROWS, 1]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()  # what was read so far is older than the kernel before
    b_mean = tl.load(means_ptr + o_r * parts + o_p, mask=m_r & (o_p < parts), other=0.0)  # [ROWS, PARTS]
    dx += norm_grad(x, dy, w, rstd, tl.sum(b_mean, 1)[:, None])
    if RESIDUAL:
        store_row(d_residual_ptr, o_rd, dx, m)
    if DELTA:
        store_row(d_delta_ptr, o_rd, dx, m)
    o_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    store_row(d_weight_ptr, o_d, tl.sum(dy * x * rstd, 0), o_d < width)


def takes(rows: int, width: int, scale: Tensor | None, d_normed: Tensor | None, d_weight: Tensor | None) -> bool:
    """Not where a row's gradient may not depend on the number of rows."""
    asked = scale is None and d_normed is not None and d_weight is not None
    return asked and rows <= FEW and width >= WIDE and not is_invariant()


def backward(
    d_new: Tensor | None,
    d_normed: Tensor,
    new_residual: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
    outputs: tuple[Tensor | None, Tensor | None, Tensor],
) -> None:
    """``outputs`` = (d_residual, d_delta, d_weight), the first two None where not wanted."""
    rows, width = new_residual.shape
    d_residual, d_delta, _ = outputs
    parts, held, early = ceil_div(width, BLOCK), next_power_of_2(rows), dependent(rstd)
    means = rstd.new_empty(rows, parts)
    with on_device(rstd):
        _means_kernel[(rows, parts)](
            d_normed, new_residual, rstd, weight, means, width, offset, BLOCK=BLOCK, DEPENDENT=early, num_warps=8
        )  # fmt: skip
        _columns_kernel[(ceil_div(width, COLUMNS),)](
            d_new, d_normed, new_residual, rstd, weight, means, *outputs, rows, width, parts, offset,
            HAS_NEW=d_new is not None, RESIDUAL=d_residual is not None, DELTA=d_delta is not None,
            PARTS=next_power_of_2(parts), ROWS=held, COLUMNS=COLUMNS, DEPENDENT=early,
            num_warps=max(1, held * COLUMNS // 1024), **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
