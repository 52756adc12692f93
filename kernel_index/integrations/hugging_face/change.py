"""Replacements on one model instance that can be undone, and the report line of each."""

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

LEVEL = 16 * torch.finfo(torch.float32).eps
"""Relative to the largest element: a dozen float32 operations agree with their formula to this."""


Kind = Literal["norms", "rope", "loss", "experts", "attention"]


@dataclass(frozen=True, slots=True)
class Change:
    """The result for one module: ``by`` names the function that now computes it; if it is empty, ``why`` is the reason.

    ``kind`` is the option of ``apply`` that the module belongs to.
    """

    module: str
    kind: Kind
    by: str = ""
    why: str = ""

    @property
    def replaced(self) -> bool:
        return bool(self.by)


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned change: ``do()`` makes it and returns its undo function; None if the module is not replaced."""

    change: Change
    do: Callable[[], Callable[[], None]] | None = None


ALREADY = "its forward has been replaced by something else"


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Give one instance another forward and return the function that removes it.

    A bound method, and not a closure over the module: a deep copy of the model is then bound to the copied module.
    """
    module.forward = types.MethodType(function, module)
    return lambda: module.__dict__.pop("forward", None)


def twin(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """The same module with other parameters, to try its forward without changing it; no weight is copied."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = {n: nn.Parameter(v, requires_grad=False) for n, v in parameters.items()}
    return other


def agree(actual: Any, expected: Tensor) -> bool:
    """Whether the result of a probe equals that of the formula."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    return bool((actual.double() - expected).abs().max() <= LEVEL * expected.abs().max())


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values on the CPU, drawn without the global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
