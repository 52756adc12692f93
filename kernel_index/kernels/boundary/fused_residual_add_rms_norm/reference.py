"""The specification: add, store, then normalise what was stored."""

import torch
from torch import Tensor

from kernel_index.core.dtypes import compute_dtype
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.contract import Call


def residual_add_rms_norm_reference(call: Call) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(call.residual, call.delta, call.weight, call.scale)
    scale = call.scale.to(dtype) if isinstance(call.scale, Tensor) else call.scale
    scaled = call.delta.to(dtype) * scale
    new_residual = (call.residual.to(dtype) + scaled).to(call.stored).contiguous()
    x = new_residual.to(dtype)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + call.eps)
    normed = x * rstd * (call.weight.to(dtype) + call.weight_offset)
    return new_residual, normed.to(call.delta.dtype).contiguous()
