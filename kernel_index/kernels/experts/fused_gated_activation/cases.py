"""Named calls of ``fused_gated_activation``."""

import math

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.experts.fused_gated_activation.api import BACKENDS, fused_gated_activation


def _call(m: Maker, *shape: int, **more: str) -> dict:
    return {"gate": m.normal(*shape), "up": m.normal(*shape), **more}


def _halves(m: Maker) -> dict:
    gate, up = m.normal(2, 7, 2 * 40).chunk(2, -1)
    return {"gate": gate, "up": up}


def _one_half(m: Maker) -> dict:
    return {"gate": m.normal(6, 2 * 19)[:, 19:], "up": m.normal(6, 19)}


def _irregular(m: Maker) -> dict:
    """No two dimensions of rows have one stride between them."""
    return {"gate": m.normal(4, 5, 24)[:, :3], "up": m.normal(3, 4, 24).transpose(0, 1)}


CASES = (
    Case("swiglu", "tokens × features", lambda m: _call(m, 48, 96)),
    Case("gelu", "GEGLU", lambda m: _call(m, 48, 96, kind="gelu")),
    Case("gelu_tanh", "Gemma's GEGLU", lambda m: _call(m, 48, 96, kind="gelu_tanh")),
    Case("relu", "ReGLU", lambda m: _call(m, 48, 96, kind="relu")),
    Case("relu2", "squared ReGLU", lambda m: _call(m, 48, 96, kind="relu2")),
    Case("halves", "the two halves of one projection", _halves),
    Case("one-half", "one view beside a tensor of its own", _one_half),
    Case("wide", "rows of several blocks", lambda m: {"gate": m.normal(3, 2500)[:, :2100], "up": m.normal(3, 2100)}),
    Case("odd", "no dimension is a multiple of a vector width", lambda m: _call(m, 3, 5, 17)),
    Case("scalar", "rank 0", _call),
    Case("empty", "an expert without tokens", lambda m: _call(m, 0, 96)),
    Case("no-features", "rows of no element", lambda m: _call(m, 3, 0)),
    Case("expanded", "a stride of 0", lambda m: {"gate": m.normal(1, 33).expand(7, 33), "up": m.normal(7, 33)}),
    Case("transposed", "dense by columns", lambda m: {"gate": m.normal(9, 31).t(), "up": m.normal(31, 9)}),
    Case("irregular", "rows without one stride", _irregular),
)


def oracle(gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
    """The formulas of the papers."""
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)) if kind == "gelu_tanh" else gate
    act = {
        "silu": lambda: gate * torch.special.expit(gate),
        "gelu": lambda: gate * torch.special.ndtr(gate),
        "gelu_tanh": lambda: 0.5 * gate * (1 + tanh),
        "relu": lambda: gate.clamp(min=0),
        "relu2": lambda: gate.clamp(min=0).square(),
    }
    return act[kind]() * up


SUITES = (
    Suite(
        op="fused_gated_activation", function=fused_gated_activation, backends=BACKENDS, cases=CASES,
        differentiable=("gate", "up"), oracle=oracle,
        sized=lambda m, n: _call(m, n, 24),
        real=lambda m, rows=8192: _call(m, rows, 4096),
        compulsory=lambda call: (3 * size_of(call["gate"]), 5 * size_of(call["gate"])), double_backward=True,
        nonfinite=("gate", "up"),
    ),
)  # fmt: skip
