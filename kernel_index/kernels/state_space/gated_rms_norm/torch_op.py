"""The op's autograd Function and the registered ops of ``triton``.  Saved: the arguments and 1/rms."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton.launch import ALIGNED, dense, dense_heads
from kernel_index.kernels.state_space.gated_rms_norm.contract import Call
from kernel_index.kernels.state_space.gated_rms_norm.reference import gated_rms_norm_reference


def _rows(x: Tensor) -> Tensor:
    """[N, C] with dense channels: a view where rows are evenly spaced.

    What Triton compiles for other distances may sum a row in another order.  So in invariant numerics a view must be to
    the compiler what dense rows are: it tells multiples of 16 from other numbers.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not is_invariant():
        return dense_heads(rows)
    alike = rows.shape[1] % 16 == rows.stride(0) % 16 == 0 and rows.stride(1) == 1 and rows.data_ptr() % ALIGNED == 0
    return rows if alike else dense((rows,))[0]


def _allocate(x, gate, weight, eps, groups, dtype):
    rstd = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), rstd


def _launch(x, gate, weight, eps, groups, dtype):
    from kernel_index.kernels.state_space.gated_rms_norm import triton

    y, rstd = _allocate(x, gate, weight, eps, groups, dtype)
    triton.forward(_rows(x), None if gate is None else _rows(gate), weight.contiguous(), eps, groups, y, rstd)
    return y, rstd


def _allocate_gradients(d_y, x, gate, weight, rstd):
    like = x, x[:0] if gate is None else gate, weight  # without a gate there is nothing to fill
    d_x, d_gate, d_weight = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like)
    return d_x, d_gate, d_weight


def _launch_backward(d_y, x, gate, weight, rstd):
    from kernel_index.kernels.state_space.gated_rms_norm import triton

    outputs = _allocate_gradients(d_y, x, gate, weight, rstd)
    gate_rows = None if gate is None else _rows(gate)
    triton.backward(_rows(d_y), _rows(x), gate_rows, weight.contiguous(), rstd, outputs)
    return outputs


_forward_op = ops.register(
    "gated_rms_norm(Tensor x, Tensor? gate, Tensor weight, float eps, int groups, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "gated_rms_norm_backward(Tensor d_y, Tensor x, Tensor? gate, Tensor weight, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_gradients,
)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, dtype: torch.dtype
    ) -> Tensor:
        y, rstd = _forward_op(x, gate, weight, eps, groups, dtype)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.numbers = eps, groups, dtype
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: the plain formula, which is differentiable
            wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
            y = gated_rms_norm_reference(Call(*inputs, *ctx.numbers))
            found = iter(torch.autograd.grad(y, wanted, d_y, create_graph=True))
            return *(next(found) if n else None for n in needs), *[None] * 3
        found = _backward_op(d_y, *inputs, rstd)
        return *(g if n else None for n, g in zip(needs, found, strict=True)), *[None] * 3


def gated_rms_norm_triton(call: Call) -> Tensor:
    if torch.is_grad_enabled():
        return ops.apply(_GatedRMSNorm, *call)
    return _forward_op(*call)[0]
