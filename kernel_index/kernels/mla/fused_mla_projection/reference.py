"""The specification: down, RMS norm, up, in at least float32, plain autograd."""

import torch
from torch import Tensor

from kernel_index.core.autocast import without_autocast
from kernel_index.kernels.mla.fused_mla_projection.contract import Call, statistics_dtype


def mla_projection_reference(call: Call) -> Tensor:
    """Under autocast, too, only the result is rounded to ``call.dtype``."""
    wide = statistics_dtype(call.x.dtype, call.norm_weight)
    x, w_down, w_up = (t.to(wide) for t in (call.x, call.w_down, call.w_up))
    with without_autocast(x):  # backward calls it, too
        latent = x @ w_down.T
        normed = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + call.eps)
        if call.norm_weight is not None:
            normed = normed * call.norm_weight.to(wide)
        return (normed @ w_up.T).to(call.dtype).contiguous()
