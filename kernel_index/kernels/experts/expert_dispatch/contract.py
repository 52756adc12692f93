"""Argument checks and backend eligibility of ``expert_plan``, ``expert_dispatch`` and ``expert_combine``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.kernels.experts.order import MOST_ROWS, check_slots

MOST_EXPERTS = 1024
"""Counts of a tile of tokens that a program of the plan holds in registers."""


class Combine(NamedTuple):
    """A checked call of ``expert_combine``."""

    rows: Tensor
    weights: Tensor
    slots: Tensor
    base: Tensor | None


def check_plan(experts: Any, count: Any) -> None:
    checks.is_tensor("experts", experts)
    if experts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"experts must be int32 or int64, got {experts.dtype}")
    checks.has_rank("experts", experts, 2, "[N, k]")
    checks.is_int("count", count, minimum=1)
    if rules.host_readable(experts) and experts.numel():
        least, most = experts.aminmax()
        if least < 0 or most >= count:
            raise ValueError(f"experts must be in [0, {count}), got {int(least if least < 0 else most)}")


def check_dispatch(x: Any, slots: Any) -> None:
    checks.is_floating("x", x)
    checks.has_rank("x", x, 2, "[N, C]")
    check_slots(slots, x, "x")
    if slots.shape[0] != x.shape[0]:
        raise ValueError(f"slots must be [N, k] with the {x.shape[0]} rows of x, got shape {tuple(slots.shape)}")


def check_combine(rows: Any, weights: Any, slots: Any, base: Any) -> Combine:
    checks.is_floating("rows", rows)
    checks.has_rank("rows", rows, 2, "[N·k, C]")
    check_slots(slots, rows, "rows")
    if slots.numel() != rows.shape[0]:
        raise ValueError(
            f"slots must be [N, k] with one slot for each of the {rows.shape[0]} rows, got shape {tuple(slots.shape)}"
        )
    checks.is_floating("weights", weights)
    checks.has_shape("weights", weights, tuple(slots.shape), "of the shape of slots,")
    checks.on_device("weights", weights, rows, "rows")
    if base is not None:
        checks.is_floating("base", base)
        checks.has_shape("base", base, (slots.shape[0], rows.shape[1]), "[N, C] =")
        checks.has_dtype("base", base, rows.dtype, "like rows")
        checks.on_device("base", base, rows, "rows")
    return Combine(rows, weights, slots, base)


def triton_plan_why_not(experts: Tensor, count: int) -> str | None:
    if count > MOST_EXPERTS:
        return "needs at most 1024 experts"  # MOST_EXPERTS
    if experts.numel() > MOST_ROWS:
        return "needs at most 2**31 - 1 pairs of a token and an expert"
    return rules.triton_why_not(experts)


def triton_dispatch_why_not(x: Tensor, slots: Tensor) -> str | None:
    return rules.triton_why_not(x, slots)


def triton_combine_why_not(call: Combine) -> str | None:
    return rules.triton_why_not(*call)


def triton_combine_not_worth(call: Combine) -> str | None:
    return rules.triton_not_worth(call.rows)


triton_not_worth = rules.triton_not_worth
