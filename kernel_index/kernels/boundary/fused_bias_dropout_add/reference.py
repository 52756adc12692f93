"""The specification: add the bias, drop by the Philox mask, add the residual."""

import torch
from torch import Tensor

from kernel_index.core.dtypes import compute_dtype
from kernel_index.kernels.boundary.fused_bias_dropout_add import philox
from kernel_index.kernels.boundary.fused_bias_dropout_add.contract import Call


def bias_dropout_add_reference(call: Call) -> Tensor:
    dtype = compute_dtype(call.x, call.residual, call.bias)
    y = call.x.to(dtype) if call.bias is None else call.x.to(dtype) + call.bias.to(dtype)
    out = call.residual.to(dtype)
    seed = philox.seed_tensor(call.seed, call.p, call.x.device)
    if seed is None:
        out = out + y
    else:
        threshold, scale = philox.threshold_and_scale(call.p, call.x.device)
        keep = philox.keep_mask(call.x.shape, seed, threshold)
        out = torch.where(keep, out + y * scale, out)  # not out + 0: a dropped −0 stays −0
    return out.to(call.residual.dtype).contiguous()
