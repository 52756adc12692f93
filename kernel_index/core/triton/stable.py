"""Sums of rows in a fixed order on a GPU: one program for a row, in blocks of one size."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import on_device
from kernel_index.core.triton.row import load_row

BLOCK = 1024


@jit
def _row_sum_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        o_d = start + tl.arange(0, BLOCK)  # [BLOCK]
        total += load_row(x_ptr + row * width, o_d, o_d < width)
    tl.store(y_ptr + row, tl.sum(total, 0))


def row_sum(x: Tensor, y: Tensor) -> Tensor:
    """``y`` [...] = the sums of dense float32 x [..., C] over its last dimension."""
    if y.numel():
        with on_device(x):
            _row_sum_kernel[(y.numel(),)](x, y, x.shape[-1], BLOCK=BLOCK, num_warps=4)
    return y
