"""Argument checks and backend eligibility of ``linear``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, device_products, native, rules
from kernel_index.core.autocast import cast_like_sdpa


class Call(NamedTuple):
    """A checked call."""

    x: Tensor  # [..., C]
    weight: Tensor  # [F, C]
    bias: Tensor | None  # [F]


def check(x: Any, weight: Any, bias: Any) -> Call:
    checks.is_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [..., C], got a tensor of rank 0")
    checks.is_floating("weight", weight)
    checks.has_rank("weight", weight, 2, "[F, C]")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [F, C] with x's C={x.shape[-1]}, got shape {tuple(weight.shape)}")
    checks.on_device("weight", weight, x, "x")
    if bias is not None:
        checks.is_floating("bias", bias)
        checks.has_shape("bias", bias, weight.shape[:1], "[F] with weight's F,")
        checks.on_device("bias", bias, x, "x")
    x, weight, bias = cast_like_sdpa(x, weight, bias)
    checks.has_dtype("weight", weight, x.dtype, "like x")
    if bias is not None:
        checks.has_dtype("bias", bias, x.dtype, "like x")
    return Call(x, weight, bias)


def triton_why_not(call: Call) -> str | None:
    return device_products.why_not(*call)


def native_why_not(call: Call) -> str | None:
    return native.op_why_not(*call)


def torch_why_not(call: Call) -> str | None:
    if call.x.dtype not in (torch.float32, torch.float64, *rules.HALF):
        return "needs float64, float32, bfloat16 or float16"
    return None
