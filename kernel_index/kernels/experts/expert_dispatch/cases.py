"""Named calls of ``expert_plan``, ``expert_dispatch`` and ``expert_combine``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.experts.expert_dispatch.api import (
    COMBINE_BACKENDS,
    DISPATCH_BACKENDS,
    PLAN_BACKENDS,
    expert_combine,
    expert_dispatch,
    expert_plan,
)


def permutation(m: Maker, tokens: int, choices: int) -> Tensor:
    pairs = tokens * choices
    order = torch.randperm(pairs, generator=m.generator)
    return order.view(tokens, choices).to(m.device)


def plan_call(m: Maker, tokens: int, choices: int, count: int, **more: Any) -> dict[str, Any]:
    return {"experts": m.integers(0, count, tokens, choices), "count": count} | more


def dispatch_call(m: Maker, tokens: int, choices: int, width: int) -> dict[str, Any]:
    return {"x": m.normal(tokens, width), "slots": permutation(m, tokens, choices)}


def combine_call(m: Maker, tokens: int, choices: int, width: int, *, base: bool = False, **more: Any) -> dict[str, Any]:
    wide = torch.promote_types(m.dtype, torch.float32)
    found: dict[str, Any] = {
        "rows": m.normal(tokens * choices, width),
        "weights": m.uniform(0, 1, tokens, choices, dtype=wide),
        "slots": permutation(m, tokens, choices),
    }
    return found | ({"base": m.normal(tokens, width)} if base else {}) | more


def planned(*, backend: Any = "auto", **kwargs: Any) -> Tensor:
    """Slots and ends of the experts in one tensor of numbers."""
    slots, offsets = expert_plan(**kwargs, backend=backend)
    return torch.cat((slots.flatten(), offsets)).to(torch.float32)


def plan_oracle(experts: Tensor, count: int) -> Tensor:
    """Pair by pair, with a list for each expert."""
    flat = experts.flatten().tolist()
    lists = [[i for i, e in enumerate(flat) if e == expert] for expert in range(count)]
    order = [i for pairs in lists for i in pairs]
    slots = sorted(range(len(order)), key=lambda slot: order[slot])
    ends = torch.tensor([len(pairs) for pairs in lists]).cumsum(0)
    return torch.cat((torch.tensor(slots, dtype=torch.int64), ends)).to(torch.float32)


def dispatch_oracle(x: Tensor, slots: Tensor) -> Tensor:
    """A product with a matrix of zeros and ones."""
    which = torch.zeros(slots.numel(), x.shape[0], dtype=x.dtype)
    for j in range(slots.shape[1]):
        which[slots[:, j].long(), torch.arange(x.shape[0])] = 1
    return which @ x


def combine_oracle(rows: Tensor, weights: Tensor, slots: Tensor, base: Tensor | None = None) -> Tensor:
    which = torch.zeros(slots.shape[0], rows.shape[0], dtype=weights.dtype)
    which = which.scatter_add(1, slots.long(), weights)
    total = which @ rows.to(weights.dtype)
    return (total if base is None else total + base).to(rows.dtype)


PLAN_CASES = (
    Case("two of five", "each token has two experts", lambda m: plan_call(m, 40, 2, 5)),
    Case("one", "one expert for each token, many tiles of the sort", lambda m: plan_call(m, 2100, 1, 16)),
    Case("idle", "experts without a token", lambda m: plan_call(m, 9, 3, 7) | {
        "experts": m.integers(2, 4, 9, 3, dtype=torch.int32)}),
    Case("single", "a single expert", lambda m: plan_call(m, 21, 1, 1)),
    Case("many", "more experts than pairs", lambda m: plan_call(m, 3, 4, 200)),
    Case("none", "no token", lambda m: plan_call(m, 0, 2, 4)),
    Case("transposed", "not contiguous", lambda m: {"experts": m.integers(0, 4, 2, 17).t(), "count": 4}),
)  # fmt: skip

DISPATCH_CASES = (
    Case("layer", "two slots for each token", lambda m: dispatch_call(m, 20, 2, 24)),
    Case("odd", "no dimension is a multiple of a vector width", lambda m: dispatch_call(m, 7, 3, 17)),
    Case("one", "a permutation of the rows", lambda m: dispatch_call(m, 11, 1, 8)),
    Case("none", "no token", lambda m: dispatch_call(m, 0, 2, 8)),
    Case("transposed", "not contiguous", lambda m: dispatch_call(m, 6, 2, 5) | {"x": m.normal(5, 6).t()}),
)

COMBINE_CASES = (
    Case("layer", "two rows for each token", lambda m: combine_call(m, 20, 2, 24)),
    Case("base", "a shared expert's output is added", lambda m: combine_call(m, 9, 4, 40, base=True)),
    Case("odd", "no dimension is a multiple of a vector width", lambda m: combine_call(m, 7, 3, 17, base=True)),
    Case("one", "one row for each token", lambda m: combine_call(m, 11, 1, 8)),
    Case("low weights", "weights in the dtype of the rows", lambda m: combine_call(
        m, 5, 2, 16, weights=m.uniform(0, 1, 5, 2))),
    Case("none", "no token", lambda m: combine_call(m, 0, 2, 8, base=True)),
)  # fmt: skip


def plan_bytes(kwargs: dict[str, Any]) -> tuple[int, int]:
    experts = kwargs["experts"]
    return size_of(experts) + 4 * experts.numel() + 4 * kwargs["count"], 0


def dispatch_bytes(kwargs: dict[str, Any]) -> tuple[int, int]:
    x, slots = kwargs["x"], kwargs["slots"]
    moved = size_of(x) * (1 + slots.shape[1]) + size_of(slots)
    return moved, moved


def combine_bytes(kwargs: dict[str, Any]) -> tuple[int, int]:
    rows, base = kwargs["rows"], kwargs.get("base")
    small = size_of(kwargs["weights"], kwargs["slots"])
    out = size_of(rows) // kwargs["slots"].shape[1]
    return size_of(rows, base) + small + out, 2 * size_of(rows) + out + small + size_of(kwargs["weights"])


SUITES = (
    Suite(
        op="expert_plan", function=planned, backends=PLAN_BACKENDS, cases=PLAN_CASES, differentiable=(),
        oracle=plan_oracle, sized=lambda m, n: plan_call(m, n, 2, 4), scales=(1.0,),
        real=lambda m, rows=32768: plan_call(m, rows, 2, 16), compulsory=plan_bytes,
    ),
    Suite(
        op="expert_dispatch", function=expert_dispatch, backends=DISPATCH_BACKENDS, cases=DISPATCH_CASES,
        differentiable=("x",), oracle=dispatch_oracle, sized=lambda m, n: dispatch_call(m, n, 2, 16),
        real=lambda m, rows=8192: dispatch_call(m, rows, 2, 4096), compulsory=dispatch_bytes,
    ),
    Suite(
        op="expert_combine", function=expert_combine, backends=COMBINE_BACKENDS, cases=COMBINE_CASES,
        differentiable=("rows", "weights", "base"), oracle=combine_oracle,
        sized=lambda m, n: combine_call(m, n, 2, 16, base=True),
        real=lambda m, rows=8192: combine_call(m, rows, 2, 4096), compulsory=combine_bytes,
    ),
)  # fmt: skip
