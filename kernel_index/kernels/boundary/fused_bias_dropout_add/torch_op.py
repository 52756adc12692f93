"""The op's autograd Function, shared by every compiled backend, and the registered ops of ``triton``.

It saves only the seed, and what follows from p: the threshold and the factor.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops, stable
from kernel_index.core.dtypes import compute_dtype
from kernel_index.core.triton import launch
from kernel_index.kernels.boundary.fused_bias_dropout_add import inductor, philox
from kernel_index.kernels.boundary.fused_bias_dropout_add.contract import Call


def _allocate(x, residual, bias, seed, threshold, scale):
    return torch.empty(x.shape, dtype=residual.dtype, device=x.device)


def _launch(x, residual, bias, seed, threshold, scale):
    from kernel_index.kernels.boundary.fused_bias_dropout_add import triton

    out = _allocate(x, residual, bias, seed, threshold, scale)
    x, residual, bias = launch.dense((x, residual, bias))
    return triton.flat(x, residual, bias, (seed, threshold, scale), out)


def _allocate_gradients(g, seed, threshold, scale, x_dtype, bias_dtype, inverted=False):
    """A gradient that is not wanted, which has no dtype, is an empty tensor: an op's outputs have a fixed number."""
    dx = torch.empty((0,) if x_dtype is None else g.shape, dtype=x_dtype or g.dtype, device=g.device)
    width = 0 if bias_dtype is None else g.shape[-1]
    return dx, torch.empty((width,), dtype=bias_dtype or g.dtype, device=g.device)


def _launch_backward(g, seed, threshold, scale, x_dtype, bias_dtype, inverted=False):
    """``inverted``: the seed is as it was saved, and a launch for it alone is not needed."""
    from kernel_index.kernels.boundary.fused_bias_dropout_add import triton

    g, mask = g.contiguous(), (seed, threshold, scale)
    dx, dbias = _allocate_gradients(g, *mask, x_dtype, bias_dtype)
    if bias_dtype is not None:
        rows = g.view(math.prod(g.shape[:-1]), g.shape[-1])
        triton.columns(rows, mask, None if x_dtype is None else dx, dbias, inverted=inverted)
    else:
        triton.flat(g, None, None, mask, dx, inverted=inverted)
    return dx, dbias


_forward_op = ops.register(
    "bias_dropout_add(Tensor x, Tensor residual, Tensor? bias, Tensor? seed, int? threshold, float? scale) -> Tensor",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "bias_dropout_add_backward(Tensor g, Tensor? seed, int? threshold, float? scale, ScalarType? x_dtype, "
    "ScalarType? bias_dtype, bool inverted=False) -> (Tensor, Tensor)",
    _launch_backward,
    _allocate_gradients,
)


def _triton_forward(x, residual, bias, seed, threshold, scale, dtype):
    return _forward_op(x, residual, bias, seed, threshold, scale)


def _triton_backward(g, inverted, threshold, scale, dtype, has_bias, x_dtype, bias_dtype):
    if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
        seed = None if inverted is None else ~inverted
        threshold, scale = (None if n is None else torch.full((), n, device=g.device) for n in (threshold, scale))
        return inductor.backward(g, seed, threshold, scale, dtype, has_bias, x_dtype, bias_dtype)
    dx, dbias = _backward_op(g, inverted, threshold, scale, x_dtype, bias_dtype, True)
    return None if x_dtype is None else dx, None if bias_dtype is None else dbias


def _native_forward(x, residual, bias, seed, threshold, scale, dtype):
    return inductor.formula(x, residual, bias, None, None, dtype).contiguous()


def _native_backward(g, seed, threshold, scale, dtype, has_bias, x_dtype, bias_dtype):
    if torch.is_grad_enabled():
        return inductor.backward(g, seed, threshold, scale, dtype, has_bias, x_dtype, bias_dtype)
    wide = g.to(dtype)
    sums = None if bias_dtype is None else stable.column_sum(wide.reshape(-1, wide.shape[-1])).to(bias_dtype)
    return None if x_dtype is None else wide.to(x_dtype), sums


_PASSES = {
    "triton": ops.Passes(_triton_forward, _triton_backward),
    "inductor": ops.Passes(inductor.forward, inductor.backward),
    "native": ops.Passes(_native_forward, _native_backward),
}


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        threshold: Tensor | int | None,
        scale: Tensor | float | None,
        backend: str,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        # Inverted, it is also a copy: the caller may advance the seed in place before backward runs.
        tensors = (threshold, scale) if isinstance(threshold, Tensor) else ()
        ctx.save_for_backward(None if seed is None else ~seed, *tensors)
        ctx.limits = None if tensors else (threshold, scale)
        ctx.dtype, ctx.backend = compute_dtype(x, residual, bias), backend
        ctx.like = x.dtype, None if bias is None else bias.dtype
        return _PASSES[backend].forward(x, residual, bias, seed, threshold, scale, ctx.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        inverted, *tensors = ctx.saved_tensors
        threshold, scale = ctx.limits or tensors
        # torch.compile would see the mask of backward as the mask of forward and keep that, a byte for each element;
        # through the detour it sees two masks and keeps the seed.
        seed = inverted if inverted is None or ctx.backend == "triton" else ~inverted
        needs_x, needs_residual, needs_bias = ctx.needs_input_grad[:3]
        x_dtype, bias_dtype = ctx.like[0] if needs_x else None, ctx.like[1] if needs_bias else None
        dx = dbias = None
        if seed is None and x_dtype is not None:
            dx, x_dtype = g.to(x_dtype), None  # the gradient passes through the additions
        if x_dtype is not None or bias_dtype is not None:
            dropped_dx, dbias = _PASSES[ctx.backend].backward(
                g, seed, threshold, scale, ctx.dtype, ctx.like[1] is not None, x_dtype, bias_dtype
            )
            dx = dx if dropped_dx is None else dropped_dx
        return dx, g if needs_residual else None, dbias, *(None,) * 4


def bias_dropout_add_native(call: Call) -> Tensor:
    """Additions, which are correctly rounded, with a sum over tokens in a fixed order for the bias."""
    return ops.apply(_BiasDropoutAdd, call.x, call.residual, call.bias, None, None, None, "native")


def bias_dropout_add_inductor(call: Call) -> Tensor:
    seed = philox.seed_tensor(call.seed, call.p, call.x.device)
    threshold, scale = (None, None) if seed is None else philox.threshold_and_scale(call.p, call.x.device)
    return ops.apply(_BiasDropoutAdd, call.x, call.residual, call.bias, seed, threshold, scale, "inductor")


def bias_dropout_add_triton(call: Call) -> Tensor:
    """Threshold and factor are numbers here: to compute them as tensors would cost several launches."""
    seed = philox.seed_tensor(call.seed, call.p, call.x.device)
    threshold = None if seed is None else round(call.p * 2**32)
    scale = None if seed is None else 1.0 / max(1.0 - call.p, 2.0**-53)
    return ops.apply(_BiasDropoutAdd, call.x, call.residual, call.bias, seed, threshold, scale, "triton")
