"""Argument checks and backend eligibility of ``fused_relu_squared``."""

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, rules
from kernel_index.core.numerics import is_invariant

triton_why_not = rules.triton_why_not
triton_not_worth = rules.triton_not_worth
inductor_not_worth = inductor.not_worth


def inductor_why_not(x: torch.Tensor) -> str | None:
    """Under invariant numerics its bits are those of ``reference``, so that speed may decide between them."""
    return inductor.why_not(x) or (inductor_not_worth(x) if is_invariant() else None)


def kept_bytes(x: Tensor) -> tuple[tuple[str, int], ...]:
    """x is saved for backward and y is not, so a layer that recomputes y saves as much again."""
    if torch.compiler.is_compiling():  # a size is a symbol there
        return ()
    size = x.numel() * x.element_size()
    return ("kept_bytes", size), ("recompute_saves_bytes", size)


def check(x: Tensor) -> None:
    checks.is_floating("x", x)
