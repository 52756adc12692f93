"""Forward and backward as one compiled pass each, with nothing saved but new_residual and 1/rms."""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.boundary.fused_residual_add_rms_norm.contract import compute_dtype, stream_dtype
from kernel_index.inductor import Region, sum_rows


def _forward(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    weight_offset: float,
    stored: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    step = delta.to(dtype) if scale is None else delta.to(dtype) * scale.to(dtype)
    new_residual = (residual.to(dtype) + step).to(stored)
    x = new_residual.to(dtype)
    rstd = torch.rsqrt(x.square().mean(-1) + eps)
    normed = x * rstd[:, None] * (weight.to(dtype) + weight_offset)
    return new_residual, normed.to(delta.dtype), rstd


def _backward(
    d_new: Tensor | None,
    d_normed: Tensor | None,
    new_residual: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    delta: Tensor | None,
    eps: float,
    weight_offset: float,
    like: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``like`` holds the dtypes of residual and delta; ``wanted`` says which of the four gradients are needed."""
    dtype = rstd.dtype
    d_residual = d_delta = d_weight = d_scale = None
    dx = None if d_new is None else d_new.to(dtype)
    if d_normed is not None:
        x = new_residual.to(dtype)
        if torch.is_grad_enabled():  # the saved 1/rms is a constant to autograd
            rstd = torch.rsqrt(x.square().mean(-1) + eps)
        x_hat = x * rstd[:, None]
        dy = d_normed.to(dtype)
        dx_hat = dy * (weight.to(dtype) + weight_offset)
        through_norm = rstd[:, None] * (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True))
        dx = through_norm if dx is None else dx + through_norm
        d_weight = sum_rows(dy * x_hat) if wanted[2] else None
    if wanted[0]:
        d_residual = dx.to(like[0])
    if wanted[1]:
        d_delta = (dx if scale is None else dx * scale.to(dtype)).to(like[1])
    if wanted[3]:
        d_scale = sum_rows(dx * delta.to(dtype))
    return d_residual, d_delta, d_weight, d_scale


_ROWS = (0,)
_forward_region = Region(_forward, residual=_ROWS, delta=_ROWS)
_backward_region = Region(_backward, d_new=_ROWS, d_normed=_ROWS, new_residual=_ROWS, rstd=_ROWS, delta=_ROWS)


class _ResidualAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        delta: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        eps: float,
        stored: torch.dtype,
        weight_offset: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(residual, delta, weight, scale)
        call = (_rows(residual), _rows(delta), weight, scale, eps, weight_offset, stored, dtype)
        new_residual, normed, rstd = _forward_region(*call)
        new_residual = new_residual.view(residual.shape)
        kept_delta = delta if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(new_residual, rstd, weight, scale, kept_delta)
        ctx.numbers, ctx.like = (eps, weight_offset), (residual.dtype, delta.dtype)
        return new_residual, normed.view(delta.shape)

    @staticmethod
    def backward(ctx: Any, d_new: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        new_residual, rstd, weight, scale, delta = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if d_new is None and d_normed is None:
            return (None,) * 7
        # d_delta = scale · d_residual: where that is the same tensor, it is computed once and given for both.  It must
        # be one tensor object, not two views: autograd copies a gradient that has a second owner before it keeps it.
        shared = scale is None and ctx.like[0] == ctx.like[1]
        wanted = (needs[0] or (shared and needs[1]), needs[1] and not shared, *needs[2:4])
        saved = _rows(new_residual), rstd, weight, scale, _rows(delta)
        call = (_rows(d_new), _rows(d_normed), *saved, *ctx.numbers, ctx.like, wanted)
        if torch.is_grad_enabled():  # create_graph: the same formula, uncompiled, so that it is differentiable
            d_residual, d_delta, d_weight, d_scale = _backward(*call)
        elif d_normed is None and scale is None:  # nothing to compute: the gradient passes through the addition
            d_residual, d_delta = (_rows(d_new).to(t) if w else None for t, w in zip(ctx.like, wanted, strict=False))
            d_weight = d_scale = None
        else:
            d_residual, d_delta, d_weight, d_scale = _backward_region(*call)
        d_residual = None if d_residual is None else d_residual.view(new_residual.shape)
        d_delta = d_residual if shared else None if d_delta is None else d_delta.view(new_residual.shape)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_scale = None if d_scale is None else d_scale.sum_to_size(scale.shape or (1,)).view_as(scale).to(scale.dtype)
        return d_residual if needs[0] else None, d_delta if needs[1] else None, d_weight, d_scale, None, None, None


def residual_add_rms_norm_inductor(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    eps: float,
    fp32_residual: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    stored = stream_dtype(residual, fp32_residual)
    if not isinstance(scale, Tensor):
        dtype = compute_dtype(residual, delta, weight)
        # A tensor, so that each layer's own number is not compiled anew.
        scale = None if scale == 1.0 else torch.full((), scale, dtype=dtype, device=delta.device)
    return _ResidualAddRMSNorm.apply(residual, delta, weight, scale, eps, stored, weight_offset)


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
