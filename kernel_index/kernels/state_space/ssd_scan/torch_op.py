"""The op's autograd Function and the registered ops of ``triton``.

Nothing is saved beside the arguments: the states between chunks are as large as x, or larger, and quickly made again.
"""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton.launch import dense, dense_heads
from kernel_index.kernels.state_space.ssd_scan.contract import Call


def _allocate(x, dt, a, b, c, d, dt_bias, segments, state, dt_softplus):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    B, _, H, P = x.shape
    return y, torch.empty((B, H, P, b.shape[3]), dtype=torch.float32, device=x.device)


def _inputs(x, dt, a, b, c, d, dt_bias, segments, state, dt_softplus):
    from kernel_index.kernels.state_space.ssd_scan import triton

    x, b, c = map(dense_heads, (x, b, c))
    a, d, dt_bias, segments, state = dense((a, d, dt_bias, segments, state))
    return triton.Inputs(x, dt, a, b, c, d, dt_bias, segments, state, dt_softplus)


def _launch(*args):
    from kernel_index.kernels.state_space.ssd_scan import triton

    outputs = _allocate(*args)
    triton.forward(_inputs(*args), *outputs)
    return outputs


def _allocate_gradients(d_y, d_last, x, dt, a, b, c, d, dt_bias, segments, state, dt_softplus):
    like = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c))
    of_heads = torch.empty((3, a.shape[0]), dtype=torch.float32, device=x.device)
    B, _, H, P = x.shape
    return *like, of_heads, torch.empty((B, H, P, b.shape[3]), dtype=torch.float32, device=x.device)


def _launch_backward(d_y, d_last, *args):
    from kernel_index.kernels.state_space.ssd_scan import triton

    outputs = _allocate_gradients(d_y, d_last, *args)
    d_last = None if d_last is None else d_last.contiguous()
    triton.backward(_inputs(*args), dense_heads(d_y), d_last, triton.Outputs(*outputs))
    return outputs


_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? dt_bias, Tensor? segments, Tensor? state, "
    "bool dt_softplus"
)
_forward_op = ops.register(f"ssd_scan({_ARGUMENTS}) -> (Tensor, Tensor)", _launch, _allocate)
_backward_op = ops.register(
    f"ssd_scan_backward(Tensor d_y, Tensor? d_last, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_gradients,
)


class _SSDScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dt_softplus: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.dt_softplus = dt_softplus
        return _forward_op(*tensors, dt_softplus)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, _, a, _, _, d, dt_bias, _, state = saved
        if d_y is None and d_last is None:
            return (None,) * 10
        d_y = torch.zeros_like(x) if d_y is None else d_y
        d_x, d_dt, d_b, d_c, of_heads, d_state = _backward_op(d_y, d_last, *saved, ctx.dt_softplus)
        d_a, d_bias, d_skip = (
            None if like is None else found.to(like.dtype)
            for like, found in zip((a, dt_bias, d), of_heads.unbind(), strict=True)
        )
        d_state = None if state is None else d_state.to(state.dtype)
        found = (d_x, d_dt, d_a, d_b, d_c, d_skip, d_bias, None, d_state)
        wanted = zip(ctx.needs_input_grad[1:], found, strict=True)
        return None, *(g if needs else None for needs, g in wanted)


def ssd_scan_triton(call: Call) -> tuple[Tensor, Tensor]:
    tensors = call[:9]
    if torch.is_grad_enabled():
        return ops.apply(_SSDScan, call.dt_softplus, *tensors)
    return _forward_op(*tensors, call.dt_softplus)
