"""What a patch consists of: replacements on one instance that can be taken back, and what is said about each."""

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LEVEL = 16 * torch.finfo(torch.float32).eps
"""A probe of a dozen float32 operations agrees with its formula to this, relative to the largest element."""


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one module: ``by`` names the function that now computes it; empty if it was left, and ``why``.

    ``kind`` is the option of ``apply`` that is concerned: ``norms``, ``rope``, ``loss``, ``experts`` or ``attention``.
    """

    module: str
    kind: str
    by: str = ""
    why: str = ""

    @property
    def replaced(self) -> bool:
        return bool(self.by)


@dataclass(frozen=True, slots=True)
class Plan:
    """A change that is still to be made: ``do()`` makes it and returns what takes it back; None for a module left."""

    change: Change
    do: Callable[[], Callable[[], None]] | None = None


ALREADY = "its forward has been replaced by something else"


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Give one instance another forward and return the function that takes it away again.

    A bound method, and not a closure over the module: a deep copy of the model is then bound to the copied module.
    """
    module.forward = types.MethodType(function, module)
    return lambda: module.__dict__.pop("forward", None)


def twin(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """The same module with other parameters, to try its forward on without touching it; nothing is copied."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = {n: nn.Parameter(v, requires_grad=False) for n, v in parameters.items()}
    return other


def agree(actual: Any, expected: Tensor) -> bool:
    """Whether a probe's result is the formula's."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    return bool((actual.double() - expected).abs().max() <= LEVEL * expected.abs().max())


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values on the CPU that leave the global generator alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
