"""Who may call ``fused_residual_add_rms_norm``, and who may answer."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, native, rules

triton_why_not = rules.triton_why_not
triton_not_worth = rules.triton_not_worth
inductor_why_not = inductor.why_not_or_traced
inductor_not_worth = inductor.not_worth_or_traced
native_not_worth = native.rows_not_worth


def check(residual: Any, delta: Any, weight: Any, scale: Any, eps: Any, fp32_residual: Any, weight_offset: Any) -> None:
    checks.is_floating("residual", residual)
    if residual.ndim == 0:
        raise ValueError("residual must be [..., C], got a tensor of rank 0")
    for name, value in (("delta", delta), ("weight", weight)):
        checks.is_floating(name, value)
        checks.on_device(name, value, residual, "residual")
    checks.has_shape("delta", delta, residual.shape, "of residual's shape")
    checks.has_shape("weight", weight, residual.shape[-1:], "of shape")
    _check_scale(scale, residual)
    checks.is_real("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    checks.is_bool("fp32_residual", fp32_residual)
    checks.is_real("weight_offset", weight_offset)


def native_why_not(residual: Tensor, delta: Tensor, weight: Tensor, scale: Any, *_: Any) -> str | None:
    if isinstance(scale, Tensor):
        return "takes a number as scale, not a tensor"
    return native.rows_why_not((residual, delta), weight)


def _check_scale(scale: Any, residual: Tensor) -> None:
    if not isinstance(scale, Tensor):
        checks.is_real("scale", scale)
        return
    checks.is_floating("scale", scale)
    checks.on_device("scale", scale, residual, "residual")
    channels = residual.shape[-1]
    if scale.ndim > 1 or (scale.ndim == 1 and scale.shape[0] not in (1, channels)):
        legend = f"a number or a tensor of 1 or {channels} elements"
        raise ValueError(f"scale must be {legend}, got shape {tuple(scale.shape)}")


def compute_dtype(*values: Any) -> torch.dtype:
    """The dtype of all arithmetic: float32, or float64 where an argument is."""
    wide = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in values)
    return torch.float64 if wide else torch.float32


def stream_dtype(residual: Tensor, fp32_residual: bool) -> torch.dtype:
    """The dtype in which the residual stream is stored."""
    return torch.promote_types(residual.dtype, torch.float32) if fp32_residual else residual.dtype
