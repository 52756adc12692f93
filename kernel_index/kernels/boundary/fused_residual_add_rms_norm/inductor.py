"""Forward and backward as one compiled pass each over rows ``[N, C]``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.inductor import Region
from kernel_index.core.stable import PYTORCH


def _forward(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    weight_offset: float,
    stored: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = delta.to(dtype) if scale is None else delta.to(dtype) * scale.to(dtype)
    new_residual = (residual.to(dtype) + scaled).to(stored)
    x = new_residual.to(dtype)
    rstd = torch.rsqrt(x.square().mean(-1) + eps)
    normed = x * rstd[:, None] * (weight.to(dtype) + weight_offset)
    return new_residual, normed.to(delta.dtype), rstd


def gradients(
    d_new: Tensor | None,
    d_normed: Tensor | None,
    new_residual: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    delta: Tensor | None,
    eps: float,
    weight_offset: float,
    like: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool, bool, bool],
    *,
    f: Any = PYTORCH,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``like`` holds the dtypes of residual and delta; ``wanted`` says which of the four gradients are needed.

    ``f`` has the sums: PyTorch's, or those of ``core.stable``.
    """
    dtype = rstd.dtype
    d_residual = d_delta = d_weight = d_scale = None
    dx = None if d_new is None else d_new.to(dtype)
    if d_normed is not None:
        x = new_residual.to(dtype)
        if torch.is_grad_enabled():  # the saved 1/rms is a constant to autograd
            rstd = torch.rsqrt(x.square().mean(-1) + eps)
        x_hat = x * rstd[:, None]
        dy = d_normed.to(dtype)
        dx_hat = dy * (weight.to(dtype) + weight_offset)
        through_norm = rstd[:, None] * (dx_hat - x_hat * f.row_mean(dx_hat * x_hat)[:, None])
        dx = through_norm if dx is None else dx + through_norm
        d_weight = f.column_sum(dy * x_hat) if wanted[2] else None
    assert dx is not None, "a pass without any upstream gradient is not run"
    if wanted[0]:
        d_residual = dx.to(like[0])
    if wanted[1]:
        d_delta = (dx if scale is None else dx * scale.to(dtype)).to(like[1])
    if wanted[3] and delta is not None:
        d_scale = f.column_sum(dx * delta.to(dtype))
    return d_residual, d_delta, d_weight, d_scale


_ROWS = (0,)
forward = Region(_forward, residual=_ROWS, delta=_ROWS)
backward = Region(gradients, d_new=_ROWS, d_normed=_ROWS, new_residual=_ROWS, rstd=_ROWS, delta=_ROWS)
