"""Argument checks and backend eligibility of ``fused_gated_activation``."""

import typing
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, native, rules

GatedKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

KINDS = typing.get_args(GatedKind)


class Call(NamedTuple):
    """A checked call."""

    gate: Tensor
    up: Tensor
    kind: str


def check(gate: Any, up: Any, kind: Any) -> Call:
    checks.is_floating("gate", gate)
    checks.is_floating("up", up)
    checks.has_dtype("up", up, gate.dtype, "like gate")
    checks.has_shape("up", up, tuple(gate.shape), "of gate's shape")
    checks.on_device("up", up, gate, "gate")
    checks.one_of("kind", kind, KINDS)
    return Call(gate, up, kind)


def check_linear(call: Call, linear: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(linear, tuple) or len(linear) != 2:
        raise TypeError(f"linear must be a pair of weight and bias, got {type(linear).__name__}")
    weight, bias = linear
    checks.is_floating("linear[0]", weight)
    checks.on_device("linear[0]", weight, call.gate, "gate")
    if weight.ndim != 2 or call.gate.ndim == 0 or weight.shape[1] != call.gate.shape[-1]:
        raise ValueError(f"linear[0] must be [O, F] with gate's last dimension F, got shape {tuple(weight.shape)}")
    if bias is not None:
        checks.is_floating("linear[1]", bias)
        checks.on_device("linear[1]", bias, call.gate, "gate")
        checks.has_shape("linear[1]", bias, tuple(weight.shape[:1]), "[O]")
    return weight, bias


def kept_bytes(call: Call) -> tuple[tuple[str, int], ...]:
    """gate and up are saved for backward and y is not, so a layer that recomputes y saves its bytes."""
    if torch.compiler.is_compiling():  # a size is a symbol there
        return ()
    size = call.gate.numel() * call.gate.element_size()
    return ("kept_bytes", 2 * size), ("recompute_saves_bytes", size)


def triton_why_not(call: Call) -> str | None:
    return rules.triton_why_not(*call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.gate)


def native_why_not(call: Call) -> str | None:
    return native.op_why_not(call.gate, call.up)


def inductor_why_not(call: Call) -> str | None:
    return inductor.why_not(*call)


def inductor_not_worth(call: Call) -> str | None:
    return inductor.not_worth(call.gate)
