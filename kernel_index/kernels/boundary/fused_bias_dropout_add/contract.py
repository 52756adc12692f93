"""Argument checks and backend eligibility of ``fused_bias_dropout_add``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, native, rules
from kernel_index.core.numerics import is_invariant


class Call(NamedTuple):
    """A checked call.  ``p`` is 0 outside of training; a ``seed`` of None is drawn by the backend that runs."""

    x: Tensor
    residual: Tensor
    bias: Tensor | None
    p: float
    seed: int | Tensor | None


def check(x: Any, residual: Any, bias: Any, p: Any, training: Any, seed: Any) -> Call:
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
    checks.is_probability("p", p)
    checks.is_bool("training", training)
    _check_seed(seed, x)
    return Call(x, residual, bias, p if training else 0.0, seed)


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


NO_DROPOUT = "has no dropout: the mask follows an element's place in the batch"


def triton_why_not(call: Call) -> str | None:
    if call.p and is_invariant():
        return NO_DROPOUT
    return rules.triton_why_not(call.x, call.residual, call.bias)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.x)


def native_why_not(call: Call) -> str | None:
    if call.p:
        return NO_DROPOUT
    return native.op_why_not(call.x, call.residual, call.bias)


def inductor_why_not(call: Call) -> str | None:
    return inductor.why_not_or_traced(call.x, call.residual, call.bias)


def inductor_not_worth(call: Call) -> str | None:
    return inductor.not_worth_or_traced(call.x)
