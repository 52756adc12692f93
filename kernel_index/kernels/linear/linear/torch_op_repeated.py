"""Calls in invariant numerics on a GPU that repeat an earlier one: without checks and without choosing a backend.

A training step calls its layers again and again, and for a model of small layers the host is the limit.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import rules, settled
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.linear.linear.contract import Call
from kernel_index.kernels.linear.linear.torch_op import linear_triton

KNOWN: set[Hashable] = set()
"""Keys of calls that were checked and ran in Triton."""

MOST_KNOWN = 4096
"""Then it begins anew."""


def key_of(x: Any, weight: Any, bias: Any) -> Hashable | None:
    """All that the checks and the rules of a call read; None where something else may decide it."""
    found: list[Any] = []
    for tensor in (x, weight, bias):
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) not in rules.PLAIN or not tensor.is_cuda or tensor.is_neg():
            return None
        found += (tensor.shape if found else (tensor.ndim, tensor.shape[-1:]), tensor.dtype, tensor.get_device())
    if not is_invariant() or not settled.is_unwatched("linear"):
        return None
    return *found, _cast()


def _cast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def remember(key: Hashable | None) -> None:
    """Keep the key of a call that ``triton`` has run."""
    if key is not None:
        if len(KNOWN) >= MOST_KNOWN:
            KNOWN.clear()
        KNOWN.add(key)


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The result of a call whose key is known."""
    if (dtype := _cast()) is not None:  # none of them is float64, which autocast leaves alone and Triton does not take
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return linear_triton(Call(x, weight, bias))
