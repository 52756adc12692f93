"""Argument checks and backend eligibility of ``expert_route``."""

from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from kernel_index.core import checks, rules

Scores = Literal["sigmoid", "softmax"]

SMALLEST_SUM = 1e-20
"""Of the scores of a token's experts: what they are divided by at least."""

MOST_EXPERTS = 256
"""Scores of a token that a program holds in registers."""


class Call(NamedTuple):
    """A checked call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    topk: int
    scores: Scores


def check(x: Any, weight: Any, bias: Any, topk: Any, scores: Any) -> Call:
    checks.is_floating("x", x)
    checks.has_rank("x", x, 2, "[N, C]")
    checks.is_floating("weight", weight)
    checks.has_rank("weight", weight, 2, "[E, C]")
    if weight.shape[0] == 0:
        raise ValueError("weight must have a row for at least one expert, got none")
    checks.has_shape("weight", weight, (weight.shape[0], x.shape[1]), "[E, C] with the C of x,")
    checks.on_device("weight", weight, x, "x")
    if bias is not None:
        checks.is_floating("bias", bias)
        checks.has_shape("bias", bias, (weight.shape[0],), "[E] =")
        checks.on_device("bias", bias, x, "x")
    checks.is_int("topk", topk, minimum=1)
    if topk > weight.shape[0]:
        raise ValueError(f"topk must be at most the number of experts ({weight.shape[0]}), got {topk}")
    checks.one_of("scores", scores, get_args(Scores))
    return Call(x, weight, bias, topk, scores)


def triton_why_not(call: Call) -> str | None:
    if call.weight.shape[0] > MOST_EXPERTS:
        return "needs at most 256 experts"  # MOST_EXPERTS
    return rules.triton_why_not(*call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.x)
