"""Argument checks and backend eligibility of the row gathers."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, rules

GIANT = 1_000_000
"""Indices of a gather above which ``index_select`` runs instead of ``triton``."""


def check(sources: dict[str, Any], idx: Any) -> None:
    """``sources`` are the tensors to gather from, under their arguments' names."""
    (first, a), *others = sources.items()
    for name, value in sources.items():
        checks.is_tensor(name, value)
        checks.has_rank(name, value, 3, "[N, H, D]")
        checks.on_device(name, value, a, first)
    for name, value in others:
        if value.shape[:2] != a.shape[:2]:
            legend = f"[N, H, D] with the rows and heads of {first},"
            raise ValueError(f"{name} must be {legend} {tuple(a.shape[:2])}, got shape {tuple(value.shape)}")
    checks.is_tensor("idx", idx)
    if idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"idx must be int32 or int64, got {idx.dtype}")
    checks.has_rank("idx", idx, 1, "[R]")
    checks.on_device("idx", idx, a, first)
    if a.shape[0] == 0 and idx.shape[0] > 0:
        raise ValueError(f"idx must be empty where {first} has no rows, got {idx.shape[0]} indices")


def triton_why_not(a: Tensor, b: Tensor | None, idx: Tensor) -> str | None:
    if idx.shape[0] > GIANT:
        return "giant_row_fallback"
    if idx.shape[0] == 0 or a.numel() == 0 or (b is not None and b.numel() == 0):
        return "needs at least one row and one element"
    if a.shape[0] > 2**31 - 1:
        return "needs a source of at most 2**31 - 1 rows"
    if not a.is_contiguous() or not (b is None or b.is_contiguous()):
        return "needs contiguous sources"
    if any(t is not None and t.is_complex() for t in (a, b)):
        return "needs real numbers"
    if any(t is not None and t.is_quantized for t in (a, b)):
        return "needs numbers that are not quantised"
    return rules.triton_why_not(a, b, idx)


triton_not_worth = rules.triton_not_worth


def eager_why_not(a: Tensor, b: Tensor | None, idx: Tensor) -> str | None:
    return rules.plain_why_not(a, b, idx)
