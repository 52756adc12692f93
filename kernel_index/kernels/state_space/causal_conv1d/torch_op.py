"""The op's autograd Function and the registered ops of ``triton``.  Saved: the arguments."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton.launch import dense, dense_heads
from kernel_index.kernels.state_space.causal_conv1d.contract import Call


def _allocate(x, weight, bias, segments, state, activation):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(x, weight, bias, segments, state, activation):
    from kernel_index.kernels.state_space.causal_conv1d import triton

    y = _allocate(x, weight, bias, segments, state, activation)
    bias, segments, state = dense((bias, segments, state))
    triton.forward(dense_heads(x), weight, bias, segments, state, activation, y)
    return y


def _allocate_gradients(d_y, x, weight, bias, segments, state, activation):
    """Of x, of weight and bias as rows [W + 1, C] in float32, and of the state: empty without one."""
    C, taps = weight.shape
    rows = torch.empty((taps + 1, C), dtype=torch.float32, device=x.device)
    before = (0,) if state is None else state.shape
    d_state = torch.empty(before, dtype=x.dtype if state is None else state.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), rows, d_state


def _launch_backward(d_y, x, weight, bias, segments, state, activation):
    from kernel_index.kernels.state_space.causal_conv1d import triton

    outputs = _allocate_gradients(d_y, x, weight, bias, segments, state, activation)
    bias, segments, state = dense((bias, segments, state))
    triton.backward(dense_heads(d_y), dense_heads(x), weight, bias, segments, state, activation, outputs)
    return outputs


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? segments, Tensor? state, str? activation"
_forward_op = ops.register(f"causal_conv1d({_ARGUMENTS}) -> Tensor", _launch, _allocate)
_backward_op = ops.register(
    f"causal_conv1d_backward(Tensor d_y, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_gradients,
)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str | None, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.activation = activation
        return _forward_op(*tensors, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        _, weight, bias, _, state = saved
        d_x, rows, d_state = _backward_op(d_y, *saved, ctx.activation)
        d_bias = None if bias is None else rows[-1].to(bias.dtype)
        found = (d_x, rows[:-1].T.to(weight.dtype), d_bias, None, None if state is None else d_state)
        return None, *(g if needs else None for needs, g in zip(ctx.needs_input_grad[1:], found, strict=True))


def causal_conv1d_triton(call: Call) -> Tensor:
    if torch.is_grad_enabled():
        return ops.apply(_CausalConv1d, call.activation, *call[:5])
    return _forward_op(*call[:5], call.activation)
