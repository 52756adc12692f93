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
