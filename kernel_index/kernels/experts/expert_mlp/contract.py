"""Argument checks and backend eligibility of ``expert_mlp``."""

from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.kernels.experts import order

ExpertActivation = Literal["relu2", "swiglu"]


class Call(NamedTuple):
    """A checked call of ``expert_mlp``."""

    x: Tensor
    up: Tensor
    down: Tensor
    weights: Tensor
    slots: Tensor
    offsets: Tensor
    base: Tensor | None
    activation: ExpertActivation


def check(x: Any, up: Any, down: Any, weights: Any, slots: Any, offsets: Any, base: Any, activation: Any) -> Call:
    checks.one_of("activation", activation, get_args(ExpertActivation))
    checks.is_floating("x", x)
    checks.has_rank("x", x, 2, "[N, C]")
    for name, weight, legend in (("up", up, "[E, F, C] or [E, 2·F, C]"), ("down", down, "[E, C, F]")):
        checks.is_floating(name, weight)
        checks.has_rank(name, weight, 3, legend)
        checks.has_dtype(name, weight, x.dtype, "like x")
        checks.on_device(name, weight, x, "x")
    experts, _, hidden = down.shape
    if experts == 0:
        raise ValueError("down must hold at least one expert, got none")
    checks.has_shape("down", down, (experts, x.shape[1], hidden), "[E, C, F] with the C of x,")
    width = hidden if activation == "relu2" else 2 * hidden
    legend = "[E, F, C]" if activation == "relu2" else "[E, 2·F, C]"
    checks.has_shape("up", up, (experts, width, x.shape[1]), f"{legend} with the E, C and F of down,")
    _check_order(x, weights, slots, offsets, base, experts)
    return Call(x, up, down, weights, slots, offsets, base, activation)


def _check_order(x: Tensor, weights: Any, slots: Any, offsets: Any, base: Any, groups: int) -> None:
    checks.is_tensor("slots", slots)
    if slots.ndim == 2 and slots.shape[0] != x.shape[0]:
        raise ValueError(f"slots must be [N, k] with the {x.shape[0]} rows of x, got shape {tuple(slots.shape)}")
    order.check_slots(slots, x, "x")
    order.check_offsets(offsets, groups, slots.numel(), x)
    checks.is_floating("weights", weights)
    checks.has_shape("weights", weights, tuple(slots.shape), "of the shape of slots,")
    checks.on_device("weights", weights, x, "x")
    if base is not None:
        checks.is_floating("base", base)
        checks.has_shape("base", base, tuple(x.shape), "[N, C] =")
        checks.has_dtype("base", base, x.dtype, "like x")
        checks.on_device("base", base, x, "x")


def triton_why_not(call: Call) -> str | None:
    if call.slots.numel() > order.MOST_ROWS:
        return "needs at most 2**31 - 1 pairs of a token and an expert"
    return order.grouped_mm_why_not(call.x, call.up, call.down) or rules.triton_why_not(*call[:-1])


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.x)
