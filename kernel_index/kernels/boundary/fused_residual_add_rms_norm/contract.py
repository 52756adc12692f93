"""Argument checks and backend eligibility of ``fused_residual_add_rms_norm``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, native, rules
from kernel_index.core.numerics import is_invariant


class Call(NamedTuple):
    """A checked call; ``stored`` is the dtype in which the residual stream is stored."""

    residual: Tensor
    delta: Tensor
    weight: Tensor
    scale: float | Tensor
    eps: float
    weight_offset: float
    stored: torch.dtype


def check(residual: Any, delta: Any, weight: Any, scale: Any, eps: Any, fp32_residual: Any, weight_offset: Any) -> Call:
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
    stored = torch.promote_types(residual.dtype, torch.float32) if fp32_residual else residual.dtype
    return Call(residual, delta, weight, scale, eps, weight_offset, stored)


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


def triton_why_not(call: Call) -> str | None:
    return rules.triton_why_not(call.residual, call.delta, call.weight, call.scale)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.residual)


def native_why_not(call: Call) -> str | None:
    if isinstance(call.scale, Tensor):
        return "takes a number as scale, not a tensor"
    if is_invariant():
        return native.op_why_not(call.residual, call.delta, call.weight)
    return native.rows_why_not((call.residual, call.delta), call.weight)


def native_not_worth(call: Call) -> str | None:
    return native.rows_not_worth(call.residual)


def inductor_why_not(call: Call) -> str | None:
    return inductor.why_not_or_traced(call.residual, call.delta, call.weight, call.scale)


def inductor_not_worth(call: Call) -> str | None:
    return inductor.not_worth_or_traced(call.residual)
