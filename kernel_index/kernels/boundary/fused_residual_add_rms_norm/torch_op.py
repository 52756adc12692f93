"""The op's autograd Function, shared by every compiled backend, and the registered ops of ``triton``.

For backward it saves new_residual and 1/rms, and delta if scale needs a gradient.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops, stable
from kernel_index.core.dtypes import compute_dtype
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton import launch
from kernel_index.kernels.boundary.fused_residual_add_rms_norm import inductor, native
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.contract import Call


def _allocate(residual, delta, weight, scale, eps, weight_offset, stored):
    rows = residual.shape[0]
    new_residual = torch.empty(residual.shape, dtype=stored, device=residual.device)
    normed = torch.empty(delta.shape, dtype=delta.dtype, device=residual.device)
    return new_residual, normed, torch.empty((rows,), dtype=torch.float32, device=residual.device)


def _launch(residual, delta, weight, scale, eps, weight_offset, stored):
    from kernel_index.kernels.boundary.fused_residual_add_rms_norm import triton

    outputs = _allocate(residual, delta, weight, scale, eps, weight_offset, stored)
    residual, delta, weight, scale = launch.dense((residual, delta, weight, scale))
    return triton.forward(residual, delta, weight, scale, eps, weight_offset, outputs)


def _allocate_gradients(
    d_new, d_normed, new_residual, rstd, weight, scale, delta, offset, residual_like, delta_like, wanted
):
    """A gradient that is not wanted is an empty tensor: an op's outputs have a fixed number."""
    sizes = (new_residual.shape, new_residual.shape, weight.shape, (1,) if scale is None else scale.reshape(-1).shape)
    dtypes = residual_like, delta_like, weight.dtype, torch.float32
    return tuple(
        torch.empty(size if want else (0,), dtype=dtype, device=rstd.device)
        for size, dtype, want in zip(sizes, dtypes, wanted, strict=True)
    )


def _launch_backward(
    d_new, d_normed, new_residual, rstd, weight, scale, delta, offset, residual_like, delta_like, wanted
):
    from kernel_index.kernels.boundary.fused_residual_add_rms_norm import triton

    call = (d_new, d_normed, new_residual, rstd, weight, scale, delta)
    outputs = _allocate_gradients(*call, offset, residual_like, delta_like, wanted)
    chosen: Any = tuple(o if w else None for o, w in zip(outputs, wanted, strict=True))
    triton.backward(*launch.dense(call), offset=offset, outputs=chosen)
    return outputs


_forward_op = ops.register(
    "residual_add_rms_norm(Tensor residual, Tensor delta, Tensor weight, Tensor? scale, float eps, "
    "float weight_offset, ScalarType stored) -> (Tensor, Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "residual_add_rms_norm_backward(Tensor? d_new, Tensor? d_normed, Tensor new_residual, Tensor rstd, Tensor weight, "
    "Tensor? scale, Tensor? delta, float weight_offset, ScalarType residual_like, ScalarType delta_like, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_gradients,
)


def _triton_forward(residual, delta, weight, scale, eps, weight_offset, stored, dtype):
    return _forward_op(residual, delta, weight, scale, eps, weight_offset, stored)


def _triton_backward(d_new, d_normed, new_residual, rstd, weight, scale, delta, eps, weight_offset, like, wanted):
    call = (d_new, d_normed, new_residual, rstd, weight, scale, delta)
    gradients = _backward_op(*call, weight_offset, *like, list(wanted))
    return tuple(g if w else None for g, w in zip(gradients, wanted, strict=True))


def _launch_rows(residual, delta, weight, scale, eps, weight_offset, stored):
    rstd = residual.new_empty(residual.shape[0], dtype=torch.float32)
    factor = 1.0 if scale is None else float(scale)
    return *native.run(residual, delta, weight, factor, eps, weight_offset, stored, rstd), rstd


_rows_op = ops.NativeOp(
    "residual_add_rms_norm_rows(Tensor residual, Tensor delta, Tensor weight, Tensor? scale, float eps, "
    "float weight_offset, ScalarType stored) -> (Tensor, Tensor, Tensor)",
    _launch_rows,
    _allocate,
)


def _native_forward(residual, delta, weight, scale, eps, weight_offset, stored, dtype):
    return _rows_op(residual, delta, weight, scale, eps, weight_offset, stored)


def _native_backward(*arguments):
    return inductor.gradients(*arguments, f=stable)


_PASSES = {
    "triton": ops.Passes(_triton_forward, _triton_backward),
    "inductor": ops.Passes(inductor.forward, inductor.backward),
    "native": ops.Passes(_native_forward, _native_backward),
}


class _Constants(NamedTuple):
    """What a call has beside its tensors."""

    eps: float
    weight_offset: float
    stored: torch.dtype
    backend: str


class _ResidualAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        delta: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        constants: _Constants,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(residual, delta, weight, scale)
        eps, weight_offset, stored, backend = constants
        new_residual, normed, rstd = _PASSES[backend].forward(
            _rows(residual), _rows(delta), weight, scale, eps, weight_offset, stored, dtype
        )
        new_residual = new_residual.view(residual.shape)
        kept_delta = delta if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(new_residual, rstd, weight, scale, kept_delta)
        ctx.constants, ctx.like = constants, (residual.dtype, delta.dtype)
        return new_residual, normed.view(delta.shape)

    @staticmethod
    def backward(ctx: Any, d_new: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        new_residual, rstd, weight, scale, delta = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if d_new is None and d_normed is None:
            return (None,) * 5
        # d_delta = scale · d_residual: where that is the same tensor, it is computed once and given for both.  It must
        # be one tensor object, not two views: autograd copies a gradient that has a second owner before it keeps it.
        shared = scale is None and ctx.like[0] == ctx.like[1]
        wanted = (needs[0] or (shared and needs[1]), needs[1] and not shared, *needs[2:4])
        saved = _rows(new_residual), rstd, weight, scale, _rows(delta)
        numbers = ctx.constants.eps, ctx.constants.weight_offset
        d_stream: Any = _rows(d_new)
        arguments: Any = (d_stream, _rows(d_normed), *saved, *numbers, ctx.like, wanted)
        if torch.is_grad_enabled():  # create_graph: the same formula, uncompiled, so that it is differentiable
            d_residual, d_delta, d_weight, d_scale = inductor.gradients(*arguments)
        elif d_normed is None and scale is None:  # nothing to compute: the gradient passes through the addition
            d_residual, d_delta = (d_stream.to(t) if w else None for t, w in zip(ctx.like, wanted, strict=False))
            d_weight = d_scale = None
        else:
            d_residual, d_delta, d_weight, d_scale = _PASSES[ctx.constants.backend].backward(*arguments)
        d_residual = None if d_residual is None else d_residual.view(new_residual.shape)
        d_delta = d_residual if shared else None if d_delta is None else d_delta.view(new_residual.shape)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_scale = None if d_scale is None else d_scale.sum_to_size(scale.shape or (1,)).view_as(scale).to(scale.dtype)
        return d_residual if needs[0] else None, d_delta if needs[1] else None, d_weight, d_scale, None


def _apply(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    scale = call.scale
    if not isinstance(scale, Tensor):
        dtype = compute_dtype(call.residual, call.delta, call.weight)
        # A tensor, so that each layer's own number is not compiled anew.
        scale = None if scale == 1.0 else torch.full((), scale, dtype=dtype, device=call.delta.device)
    constants = _Constants(call.eps, call.weight_offset, call.stored, backend)
    return ops.apply(_ResidualAddRMSNorm, call.residual, call.delta, call.weight, scale, constants)


def residual_add_rms_norm_native(call: Call) -> tuple[Tensor, Tensor]:
    return _apply(call, "native") if is_invariant() else native.residual_add_rms_norm_native(call)


def residual_add_rms_norm_inductor(call: Call) -> tuple[Tensor, Tensor]:
    return _apply(call, "inductor")


def residual_add_rms_norm_triton(call: Call) -> tuple[Tensor, Tensor]:
    return _apply(call, "triton")


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
