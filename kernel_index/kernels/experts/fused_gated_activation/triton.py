"""One elementwise launch each way, over rows that may have gaps between them, as the halves of a projection have."""

import itertools
from typing import Any

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.activations import value_and_slope
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device

BLOCK = 1024
ELEMENTS_OF_A_WARP = 256


@jit
def _gated_kernel(
    gate_ptr, up_ptr, y_ptr, width, blocks, s_gate, s_up, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program has one of the ``blocks`` of a row of ``width`` elements."""
    row = tl.program_id(0).to(tl.int64) // blocks
    o_d = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_d = o_d < width
    x = tl.load(gate_ptr + row * s_gate + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + row * s_up + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
    value, _ = value_and_slope(x, KIND)
    tl.store(y_ptr + row * width + o_d, (value * up).to(y_ptr.dtype.element_ty), mask=m_d)


@jit
def _gated_backward_kernel(
    gate_ptr, up_ptr, g_ptr, d_gate_ptr, d_up_ptr, y_ptr, width, blocks, s_gate, s_up, s_g,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y_ptr`` None: the activation is not made again."""
    row = tl.program_id(0).to(tl.int64) // blocks
    o_d = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_d = o_d < width
    x = tl.load(gate_ptr + row * s_gate + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + row * s_up + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
    g = tl.load(g_ptr + row * s_g + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
    value, slope = value_and_slope(x, KIND)
    d_gate = g * up * slope
    if KIND == "relu" or KIND == "relu2":
        d_gate = tl.where(x <= 0, 0.0, d_gate)  # 0 times an infinite gradient would be NaN
    tl.store(d_gate_ptr + row * width + o_d, d_gate.to(d_gate_ptr.dtype.element_ty), mask=m_d)
    tl.store(d_up_ptr + row * width + o_d, (g * value).to(d_up_ptr.dtype.element_ty), mask=m_d)
    if y_ptr is not None:
        tl.store(y_ptr + row * width + o_d, (value * up).to(y_ptr.dtype.element_ty), mask=m_d)


def _row_stride(x: Tensor) -> int | None:
    """Elements from one row of the last dimension to the next; None where rows are not dense or not regular."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1:
        return None
    outer = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    if any(s != inner_n * inner_s for (_, s), (inner_n, inner_s) in itertools.pairwise(outer)):
        return None
    return outer[-1][1]  # there is an outer dimension: one dense row alone is contiguous


def _over_rows(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """The tensors, the stride of each one's rows, the number of rows and their width.

    Irregular tensors are copied.  Contiguous ones are one long row, whatever their shape.
    """
    tensors = [t if t.ndim and _row_stride(t) is not None else t.contiguous() for t in tensors]
    if all(t.is_contiguous() for t in tensors):
        return tensors, [0] * len(tensors), 1, tensors[0].numel()
    width = tensors[0].shape[-1]
    return tensors, [_row_stride(t) for t in tensors], tensors[0].numel() // width, width


def _geometry(rows: int, width: int, kind: str) -> tuple[tuple[int], dict]:
    block = min(BLOCK, next_power_of_2(width))
    blocks = ceil_div(width, block)
    warps = max(1, block // ELEMENTS_OF_A_WARP)
    return (rows * blocks,), {"blocks": blocks, "KIND": kind, "BLOCK": block, "num_warps": warps}


def forward(gate: Tensor, up: Tensor, kind: str, y: Tensor) -> Tensor:
    if y.numel():
        inputs, strides, rows, width = _over_rows(gate, up)
        grid, geometry = _geometry(rows, width, kind)
        with on_device(gate):
            _gated_kernel[grid](*inputs, y, width, s_gate=strides[0], s_up=strides[1], **geometry)
    return y


def backward(gate: Tensor, up: Tensor, g: Tensor, kind: str, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """``outputs`` are filled: the gradients of gate and up, and the activation, or None where it is not wanted."""
    if g.numel():
        inputs, strides, rows, width = _over_rows(gate, up, g)
        grid, geometry = _geometry(rows, width, kind)
        names = dict(zip(("s_gate", "s_up", "s_g"), strides, strict=True))
        with on_device(gate):
            _gated_backward_kernel[grid](*inputs, *outputs, width, **names, **geometry)
    return outputs
