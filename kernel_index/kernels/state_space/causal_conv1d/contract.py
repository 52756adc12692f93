"""Argument checks and backend eligibility of ``causal_conv1d``."""

from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.kernels.state_space.segments import check_segments

ConvActivation = Literal["silu"]
ACTIVATIONS = (*get_args(ConvActivation), None)
MOST_TAPS = 4
"""The widest filter of the Triton kernels, which have a value for each tap, input and gradient."""


class Call(NamedTuple):
    """A checked call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    segments: Tensor | None
    state: Tensor | None
    activation: str | None


def check(x: Any, weight: Any, bias: Any, activation: Any, segments: Any, state: Any) -> Call:
    checks.is_floating("x", x)
    checks.has_rank("x", x, 3, "[B, T, C]")
    if x.shape[1] == 0:
        raise ValueError(f"x must be [B, T, C] with at least one token, got shape {tuple(x.shape)}")
    B, _, C = x.shape
    checks.is_floating("weight", weight)
    checks.on_device("weight", weight, x, "x")
    if weight.ndim != 2 or weight.shape[0] != C or weight.shape[1] == 0:
        raise ValueError(f"weight must be [C, W] with C = {C} and W of at least 1, got shape {tuple(weight.shape)}")
    taps = weight.shape[1]
    optional = ("bias", bias, (C,), "[C]"), ("state", state, (B, taps - 1, C), "[B, W − 1, C]")
    for name, value, shape, legend in optional:
        if value is not None:
            checks.is_floating(name, value)
            checks.on_device(name, value, x, "x")
            checks.has_shape(name, value, shape, legend)
    checks.one_of("activation", activation, ACTIVATIONS)
    if segments is not None:
        check_segments(segments, x)
    return Call(x, weight, bias, segments, state, activation)


def triton_why_not(call: Call) -> str | None:
    if call.weight.shape[1] > MOST_TAPS:
        return "needs filters of at most 4 taps"  # MOST_TAPS
    return rules.triton_why_not(*call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.x)
