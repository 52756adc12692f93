"""The RMS norm between the two products, forward and backward over rows ``[N, L]``: plain, and as compiled regions."""

import torch
from torch import Tensor

from kernel_index.core.inductor import Region, sum_rows
from kernel_index.kernels.mla.fused_mla_projection.contract import statistics_dtype


def normalise(latent: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """normed in latent's dtype, and 1/rms ``[N]``."""
    dtype = statistics_dtype(latent.dtype, weight)
    c = latent.to(dtype)
    rstd = torch.rsqrt(c.square().mean(-1) + eps)
    normed = c * rstd[:, None]
    if weight is not None:
        normed = normed * weight.to(dtype)
    return normed.to(latent.dtype), rstd


def gradients(
    d_normed: Tensor | None, latent: Tensor, rstd: Tensor, weight: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """normed recomputed, the gradient of latent, the gradient of weight; ``wanted`` says which of the three."""
    dtype = rstd.dtype
    normed = d_latent = d_weight = None
    x_hat = latent.to(dtype) * rstd[:, None]
    if wanted[0]:
        normed = (x_hat if weight is None else x_hat * weight.to(dtype)).to(latent.dtype)
    if d_normed is not None:
        dy = d_normed.to(dtype)
        if wanted[1]:
            g = dy if weight is None else dy * weight.to(dtype)
            # The mean term is the derivative of 1/rms: without it the gradient would also have a part along x̂.
            d_latent = (rstd[:, None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))).to(latent.dtype)
        if wanted[2]:
            d_weight = sum_rows(dy * x_hat)
    return normed, d_latent, d_weight


_ROWS = (0,)
normalise_region = Region(normalise, latent=_ROWS)
gradients_region = Region(gradients, d_normed=_ROWS, latent=_ROWS, rstd=_ROWS)
