"""Rows that are moved to other places, zeros where there is none: one pass over memory."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device

WIDEST = 2048
"""Elements of a row that a program moves at once."""


@jit
def _rows_at_kernel(x_ptr, index_ptr, out_ptr, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + place).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_row = tl.load(x_ptr + row * width + o_d, mask=(o_d < width) & (row >= 0), other=0.0)
    tl.store(out_ptr + place * width + o_d, b_row, mask=o_d < width)


def rows_at(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """``out`` [m, C] = the rows ``index`` [m] of dense x [n, C]; zeros where that is −1."""
    if out.numel():
        width = out.numel() // index.numel()
        block = min(WIDEST, next_power_of_2(width))
        with on_device(x):
            _rows_at_kernel[(index.numel(), ceil_div(width, block))](
                x, index, out, width, BLOCK=block, num_warps=max(1, block // 256)
            )  # fmt: skip
    return out
