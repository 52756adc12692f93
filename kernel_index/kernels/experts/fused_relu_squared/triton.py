"""One elementwise launch each way, over flat memory: any shape, one compilation for every size."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, on_device

BLOCK = 2048
NUM_WARPS = 8


@jit
def _relu_squared_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = o_x < size
    x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
    y = tl.where(x <= 0, 0.0, x * x)  # not maximum(x, 0), which would swallow a NaN
    tl.store(y_ptr + o_x, y.to(y_ptr.dtype.element_ty), mask=m_x)


@jit
def _relu_squared_backward_kernel(x_ptr, g_ptr, dx_ptr, size, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = o_x < size
    x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
    g = tl.load(g_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
    dx = tl.where(x <= 0, 0.0, 2.0 * x * g)
    tl.store(dx_ptr + o_x, dx.to(dx_ptr.dtype.element_ty), mask=m_x)


def forward(x: Tensor, y: Tensor) -> Tensor:
    x = x.contiguous()
    if y.numel():
        with on_device(x):
            grid = (ceil_div(y.numel(), BLOCK),)
            _relu_squared_kernel[grid](x, y, y.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y


def backward(x: Tensor, g: Tensor, dx: Tensor) -> Tensor:
    x, g = x.contiguous(), g.contiguous()
    if dx.numel():
        with on_device(x):
            grid = (ceil_div(dx.numel(), BLOCK),)
            _relu_squared_backward_kernel[grid](x, g, dx, dx.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return dx
