"""The specification: add the bias, drop by the Philox mask, add the residual."""

import torch
from torch import Tensor

from kernel_index.kernels.boundary.fused_bias_dropout_add import philox
from kernel_index.kernels.boundary.fused_bias_dropout_add.contract import compute_dtype


def bias_dropout_add_reference(
    x: Tensor, residual: Tensor, bias: Tensor | None, p: float, seed: Tensor | None
) -> Tensor:
    dtype = compute_dtype(x, residual, bias)
    y = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    out = residual.to(dtype)
    if seed is None:
        out = out + y
    else:
        threshold, scale = philox.threshold_and_scale(p, x.device)
        keep = philox.keep_mask(x.shape, seed, threshold)
        out = torch.where(keep, out + y * scale, out)  # not out + 0: a dropped −0 stays −0
    return out.to(residual.dtype).contiguous()
