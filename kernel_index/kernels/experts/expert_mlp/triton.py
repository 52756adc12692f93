"""The pass between the products of the backward direction: one program for each pair of a token and its expert."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.activations import value_and_slope
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device
from kernel_index.core.triton.row import load_row, store_row

WIDEST = 1024
"""Elements of a row that a program has at once."""


@jit
def _between_kernel(
    h_ptr, d_active_ptr, weights_ptr, slots_ptr, d_h_ptr, active_ptr, d_weights_ptr, width,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``d_active``: the gradient of the activation where every weight is 1.  What is stored has the weight in it."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + pair).to(tl.int64)
    weight = tl.load(weights_ptr + pair).to(tl.float32)
    HALVES: tl.constexpr = 2 if GATED else 1
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        o_d = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_d = o_d < width
        d_active = load_row(d_active_ptr + slot * width, o_d, m_d)
        x = load_row(h_ptr + slot * width * HALVES, o_d, m_d)
        if GATED:
            value, slope = value_and_slope(x, "silu")
            up = load_row(h_ptr + slot * width * 2 + width, o_d, m_d)
            active = value * up
            d_x = d_active * weight * up * slope
            store_row(d_h_ptr + slot * width * 2 + width, o_d, d_active * weight * value, m_d)
        else:
            active, slope = value_and_slope(x, "relu2")
            d_x = tl.where(x <= 0, 0.0, d_active * weight * slope)  # 0 times an infinite gradient would be NaN
        store_row(d_h_ptr + slot * width * HALVES, o_d, d_x, m_d)
        store_row(active_ptr + slot * width, o_d, active * weight, m_d)
        products += tl.where(m_d, active * d_active, 0.0)
    tl.store(d_weights_ptr + pair, tl.sum(products, 0).to(d_weights_ptr.dtype.element_ty))


def between(
    h: Tensor, d_active: Tensor, weights: Tensor, slots: Tensor, outputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Dense h [S, F or 2·F], d_active [S, F], weights and slots [N, k] in; d_h, w·act(h) and d_weights are filled."""
    width = d_active.shape[1]
    if slots.numel():
        block = min(WIDEST, next_power_of_2(width))
        with on_device(h):
            _between_kernel[(slots.numel(),)](
                h, d_active, weights, slots, *outputs, width, GATED=h.shape[1] != width, BLOCK=block,
                num_warps=max(1, block // 256),
            )  # fmt: skip
