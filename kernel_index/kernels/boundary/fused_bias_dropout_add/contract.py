"""Who may call ``fused_bias_dropout_add``, and who may answer."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, rules

triton_why_not = rules.triton_why_not
triton_not_worth = rules.triton_not_worth
inductor_why_not = inductor.why_not_or_traced
inductor_not_worth = inductor.not_worth_or_traced


def check(x: Any, residual: Any, bias: Any, p: Any, training: Any, seed: Any) -> None:
    checks.is_floating("x", x)
    checks.is_floating("residual", residual)
    checks.on_device("residual", residual, x, "x")
    checks.has_shape("residual", residual, x.shape, "of x's shape")
    if bias is not None:
        checks.is_floating("bias", bias)
        checks.on_device("bias", bias, x, "x")
        if x.ndim == 0:
            raise ValueError("bias must be None for an x of rank 0, got a tensor")
        checks.has_shape("bias", bias, x.shape[-1:], "of shape")
    checks.is_real("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p must be between 0 and 1, got {p}")
    checks.is_bool("training", training)
    _check_seed(seed, x)


def _check_seed(seed: Any, x: Tensor) -> None:
    if seed is None:
        return
    if isinstance(seed, Tensor):
        checks.has_dtype("seed", seed, torch.int64, "or a Python integer")
        if seed.numel() != 1:
            raise ValueError(f"seed must be one number, got shape {tuple(seed.shape)}")
        checks.on_device("seed", seed, x, "x")
        return
    checks.is_int("seed", seed)


def compute_dtype(*values: Tensor | None) -> torch.dtype:
    """The dtype of all arithmetic: float32, or float64 where an argument is."""
    wide = any(v is not None and v.dtype == torch.float64 for v in values)
    return torch.float64 if wide else torch.float32
