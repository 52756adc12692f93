"""Named calls of ``gated_rms_norm``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.state_space.gated_rms_norm.api import BACKENDS, gated_rms_norm


def call(m: Maker, *shape: int, **more: Any) -> dict[str, Any]:
    wide = torch.promote_types(m.dtype, torch.float32)
    found = {"x": m.normal(*shape), "gate": m.normal(*shape, scale=2.0)}
    return found | {"weight": m.normal(shape[-1], scale=1.0, dtype=wide)} | more


def part_of_a_projection(m: Maker) -> dict[str, Any]:
    return call(m, 3, 5, 32) | {"gate": m.normal(3, 5, 80, scale=2.0)[..., 16:48]}


def transposed(m: Maker) -> dict[str, Any]:
    return call(m, 6, 24) | {"x": m.normal(24, 6).t(), "gate": m.normal(6, 1, scale=2.0).expand(6, 24)}


def oracle(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    z = (x if gate is None else x * (gate / (1 + torch.exp(-gate)))).unflatten(-1, (groups, -1))
    rms = torch.sqrt((z * z).sum(-1, keepdim=True) / z.shape[-1] + eps)
    return ((z / rms).flatten(-2) * weight).to(x.dtype)


def compulsory(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Forward reads x and gate and writes y; backward reads both and d_y, and writes two gradients."""
    x, weight = kwargs["x"], size_of(kwargs["weight"])
    both = size_of(x, kwargs["gate"])
    per_row = 4 * (x.numel() // x.shape[-1]) * kwargs.get("groups", 1)  # 1/rms
    return both + size_of(x) + weight + per_row, 2 * both + size_of(x) + 2 * weight + per_row


CASES = (
    Case("layer", "batch × tokens × inner width", lambda m: call(m, 2, 24, 96)),
    Case("odd", "no dimension is a multiple of a vector width", lambda m: call(m, 3, 5, 17)),
    Case("groups", "each group has a norm of its own", lambda m: call(m, 2, 7, 60, groups=4, eps=1e-5)),
    Case("one row", "rank 1: a single token in decoding", lambda m: call(m, 33)),
    # eps of the channel's size: with a small one the gradient of a sign is nothing but what cancellation leaves
    Case("one channel", "every value becomes nearly its own sign", lambda m: call(m, 6, 1, eps=0.3)),
    Case("no rows", "a data-parallel rank without tokens", lambda m: call(m, 0, 64)),
    Case("part of a projection", "the gate is a slice of the projection's output", part_of_a_projection),
    Case("transposed", "not contiguous, and a gate of strides 0", transposed),
    Case("no gate", "the norm alone", lambda m: call(m, 6, 40) | {"gate": None}),
    Case("low weight", "a weight in the dtype of x", lambda m: call(m, 5, 48, weight=m.normal(48, scale=1.0))),
)

SUITES = (
    Suite(
        op="gated_rms_norm", function=gated_rms_norm, backends=BACKENDS, cases=CASES,
        differentiable=("x", "gate", "weight"), oracle=oracle, sized=lambda m, n: call(m, n, 24, groups=2),
        real=lambda m, rows=8192: call(m, rows, 4096), compulsory=compulsory, nonfinite=("x", "weight"),
        double_backward=True,
    ),
)  # fmt: skip
