"""The specification: down, RMS norm, up, in at least float32, plain autograd."""

import contextlib

import torch
from torch import Tensor

from kernel_index.kernels.mla.fused_mla_projection.contract import autocasts, statistics_dtype


def mla_projection_reference(
    x: Tensor, w_down: Tensor, w_up: Tensor, norm_weight: Tensor | None, eps: float, recompute: str, dtype: torch.dtype
) -> Tensor:
    """``dtype`` is the result's.  Under autocast, too, everything before that is computed as wide as it comes."""
    wide = statistics_dtype(x.dtype, norm_weight)
    x, w_down, w_up = (t.to(wide) for t in (x, w_down, w_up))
    with torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext():
        latent = x @ w_down.T
        normed = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps)
        if norm_weight is not None:
            normed = normed * norm_weight.to(wide)
        return (normed @ w_up.T).to(dtype).contiguous()
