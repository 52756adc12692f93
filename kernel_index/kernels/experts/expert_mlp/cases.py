"""Named calls of ``expert_mlp``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.experts.expert_dispatch.api import expert_plan
from kernel_index.kernels.experts.expert_mlp.api import BACKENDS, expert_mlp


def call(
    m: Maker,
    tokens: int,
    choices: int,
    width: int,
    hidden: int,
    experts: int,
    *,
    gated: bool = False,
    among: tuple[int, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Weights of the size that a layer begins with, so that the sums stay in range at any scale of x."""
    wide = torch.promote_types(m.dtype, torch.float32)
    selected = torch.randint(*(among or (0, experts)), (tokens, choices), generator=m.generator)
    slots, offsets = expert_plan(selected, experts, backend="reference")
    return {
        "x": m.normal(tokens, width),
        "up": m.normal(experts, 2 * hidden if gated else hidden, width, scale=width**-0.5),
        "down": m.normal(experts, width, hidden, scale=hidden**-0.5),
        "weights": m.uniform(0, 1, tokens, choices, dtype=wide),
        "slots": slots.to(m.device),
        "offsets": offsets.to(m.device),
        "activation": "swiglu" if gated else "relu2",
    } | more


def oracle(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    slots: Tensor,
    offsets: Tensor,
    base: Tensor | None = None,
    activation: str = "relu2",
) -> Tensor:
    """Each pair of a token and its expert by itself, with the expert's own matrices."""
    expert = (slots[..., None] >= offsets).sum(-1)  # [N, k]
    h = torch.einsum("nc,nkfc->nkf", x, up[expert]).to(torch.promote_types(x.dtype, torch.float32))
    if activation == "relu2":
        active = h.relu().square()
    else:
        gate, value = h.chunk(2, -1)
        active = torch.nn.functional.silu(gate) * value
    rows = torch.einsum("nkf,nkcf->nkc", active.to(x.dtype), down[expert])
    out = (rows.to(weights.dtype) * weights[..., None]).sum(1)
    return (out if base is None else out + base).to(x.dtype)


CASES = (
    Case("relu2", "two of five experts", lambda m: call(m, 21, 2, 16, 24, 5)),
    Case("swiglu", "gate and up in one matrix", lambda m: call(m, 17, 3, 24, 16, 4, gated=True)),
    Case("base", "a shared expert's output is added", lambda m: call(
        m, 9, 2, 16, 8, 3, gated=True) | {"base": m.normal(9, 16)}),
    Case("idle", "experts without a token", lambda m: call(m, 19, 2, 8, 16, 7, among=(2, 5))),
    Case("one", "one expert for every token: a feed-forward layer", lambda m: call(m, 11, 1, 16, 8, 1)),
    Case("none", "no token", lambda m: call(m, 0, 2, 16, 8, 4, gated=True)),
    Case("odd", "widths that PyTorch's grouped kernels do not take", lambda m: call(m, 6, 2, 7, 5, 3)),
)  # fmt: skip


def compulsory(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Each tensor once; and what is kept between the products, once each way."""
    x, up, down, slots = (kwargs[n] for n in ("x", "up", "down", "slots"))
    hidden = slots.numel() * up.shape[1] * x.element_size()
    moved = 2 * size_of(x) + size_of(up, down, kwargs.get("base")) + hidden
    return moved, moved + size_of(x, up, down)


SUITES = (
    Suite(
        op="expert_mlp", function=expert_mlp, backends=BACKENDS, cases=CASES,
        differentiable=("x", "up", "down", "weights", "base"), oracle=oracle,
        sized=lambda m, n: call(m, n, 2, 16, 8, 3, gated=True), scales=(1e-3, 1.0, 16.0),
        real=lambda m, rows=8192: call(m, rows, 2, 1024, 1024, 16, gated=True), compulsory=compulsory,
        rounding=("triton", "parts"), double_backward=True,
    ),
)  # fmt: skip
