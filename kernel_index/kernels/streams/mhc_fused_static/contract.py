"""Who may call the stream-mixing functions, and who may answer."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, native, rules

STREAMS = 4
"""What the fused backends are written for."""


def check(
    hidden: Any, branch_out: Any, h_post: Any, h_res: Any, h_pre: Any, *, merges: bool = True, reads: bool = True
) -> None:
    """branch_out, h_post and h_res are None for a call that does not merge alone, h_pre for one that does not read."""
    checks.is_floating("hidden", hidden)
    if hidden.ndim < 2:
        raise ValueError(f"hidden must be [..., streams, C], got shape {tuple(hidden.shape)}")
    if merges:
        checks.is_floating("branch_out", branch_out)
        checks.has_shape(
            "branch_out", branch_out, (*hidden.shape[:-2], hidden.shape[-1]), "hidden without its streams,"
        )
        checks.on_device("branch_out", branch_out, hidden, "hidden")
        _check_coefficient("h_post", h_post, hidden, 1)
        _check_coefficient("h_res", h_res, hidden, 2)
    if reads:
        _check_coefficient("h_pre", h_pre, hidden, 1)


def _check_coefficient(name: str, value: Any, hidden: Tensor, rank: int) -> None:
    """One coefficient for the whole call, or one for each batch row: told apart by rank alone."""
    checks.is_floating(name, value)
    checks.on_device(name, value, hidden, "hidden")
    shared = (hidden.shape[-2],) * rank
    if hidden.ndim < 4:  # [T, streams] could only mean one for each token, which is not offered
        checks.has_shape(name, value, shared, "shared by the whole of a hidden without a batch dimension,")
    elif value.ndim == rank:
        checks.has_shape(name, value, shared, "of shape")
    else:
        checks.has_shape(name, value, (hidden.shape[0], *shared), f"of shape {shared} or, for each batch row,")


def is_per_row(value: Tensor | None, rank: int) -> bool:
    return value is not None and value.ndim > rank


def compute_dtype(*values: Tensor | None) -> torch.dtype:
    """The dtype of all arithmetic: float32, or float64 where an argument is."""
    wide = any(v is not None and v.dtype == torch.float64 for v in values)
    return torch.float64 if wide else torch.float32


def _form_why_not(hidden: Tensor, coefficients: tuple[Tensor | None, ...]) -> str | None:
    if hidden.ndim != 4:
        return "needs hidden [B, T, streams, C]"
    if hidden.shape[2] != STREAMS:
        return "needs 4 streams"
    if any(c is not None and c.dtype not in (torch.float32, torch.float64) for c in coefficients):
        return "needs float32 coefficients"
    return None


def triton_why_not(hidden: Tensor, branch_out: Tensor | None, *coefficients: Tensor | None) -> str | None:
    return _form_why_not(hidden, coefficients) or rules.triton_why_not(hidden, branch_out, *coefficients)


def inductor_why_not(hidden: Tensor, branch_out: Tensor | None, *coefficients: Tensor | None) -> str | None:
    return _form_why_not(hidden, coefficients) or inductor.why_not_or_traced(hidden, branch_out, *coefficients)


def native_why_not(hidden: Tensor, branch_out: Tensor | None, *coefficients: Tensor | None) -> str | None:
    if (rule := _form_why_not(hidden, coefficients)) is not None:
        return rule
    rows = (hidden,) if branch_out is None else (hidden, branch_out)
    return native.rows_why_not(rows, *(c for c in coefficients if c is not None))


triton_not_worth = rules.triton_not_worth
native_not_worth = native.rows_not_worth
inductor_not_worth = inductor.not_worth_or_traced


def check_sinkhorn(logits: Any, iters: Any, temperature: Any, eps: Any) -> None:
    checks.is_floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be square matrices [..., n, n], got shape {tuple(logits.shape)}")
    checks.is_int("iters", iters, minimum=1)
    checks.is_real("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    checks.is_real("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
