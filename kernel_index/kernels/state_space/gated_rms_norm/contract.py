"""Argument checks and backend eligibility of ``gated_rms_norm``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, rules

WIDEST = 8192
"""Elements of the widest group that a program holds in registers."""


class Call(NamedTuple):
    """A checked call."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor
    eps: float
    groups: int
    dtype: torch.dtype  # of the result


def check(x: Any, gate: Any, weight: Any, eps: Any, groups: Any, dtype: Any) -> Call:
    checks.is_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., C] with C of at least 1, got shape {tuple(x.shape)}")
    for name, value in (("gate", gate), ("weight", weight)):
        if name == "weight" or value is not None:
            checks.is_floating(name, value)
            checks.on_device(name, value, x, "x")
    if gate is not None:
        checks.has_shape("gate", gate, tuple(x.shape), "of x's shape")
    checks.has_shape("weight", weight, tuple(x.shape[-1:]), "[C]")
    checks.is_real("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    checks.is_int("groups", groups, minimum=1)
    if x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels of x, got {groups}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating dtype or None, got {dtype!r}")
    return Call(x, gate, weight, eps, groups, x.dtype if dtype is None else dtype)


def triton_why_not(call: Call) -> str | None:
    if call.x.shape[-1] // call.groups > WIDEST:
        return "needs groups of at most 8192 channels"  # WIDEST
    return rules.triton_why_not(*call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.x)
