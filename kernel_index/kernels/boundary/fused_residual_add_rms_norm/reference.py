"""The specification: add, store, then normalise what was stored."""

import torch
from torch import Tensor

from kernel_index.kernels.boundary.fused_residual_add_rms_norm.contract import compute_dtype, stream_dtype


def residual_add_rms_norm_reference(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    eps: float,
    fp32_residual: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(residual, delta, weight, scale)
    step = delta.to(dtype) * (scale.to(dtype) if isinstance(scale, Tensor) else scale)
    new_residual = (residual.to(dtype) + step).to(stream_dtype(residual, fp32_residual)).contiguous()
    x = new_residual.to(dtype)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * rstd * (weight.to(dtype) + weight_offset)
    return new_residual, normed.to(delta.dtype).contiguous()
