"""A few rows on the CPU in C++: one call instead of nine of PyTorch's."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.contract import Call


def residual_add_rms_norm_native(call: Call) -> tuple[Tensor, Tensor]:
    return run(*call, call.residual.new_empty(0, dtype=torch.float32))


def run(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    scale: Any,
    eps: float,
    weight_offset: float,
    stored: torch.dtype,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """``scale`` is a number; ``rstd`` [rows] is filled with 1/rms, unless it is empty."""
    residual, delta, weight = residual.contiguous(), delta.contiguous(), native.floats(weight)
    new_residual = torch.empty_like(residual, dtype=stored)
    normed = torch.empty_like(delta)
    channels = residual.shape[-1]
    low = (t.dtype == torch.bfloat16 for t in (residual, delta, new_residual))
    sizes = (residual.numel() // max(1, channels), channels, *low, native.rows_threads(residual))
    numbers = (scale, eps, weight_offset)
    native.call(native.ROWS, "residual_rms_norm", sizes, numbers, residual, delta, weight, new_residual, normed, rstd)
    return new_residual, normed
