"""The specification: a norm of each head where it has a weight, then a rotation of channel pairs, float32 at least."""

import torch
from torch import Tensor

from kernel_index.kernels.attention.fused_rope_qk.contract import Call


def rope_qk_reference(call: Call) -> tuple[Tensor, Tensor]:
    return _rotate(call.q, call.q_weight, call), _rotate(call.k, call.k_weight, call)


def _rotate(x_BTHD: Tensor, weight_D: Tensor | None, call: Call) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x_BTHD.dtype, call.cos.dtype), torch.float32)
    if weight_D is not None:
        dtype = torch.promote_types(dtype, weight_D.dtype)
    cos, sin, x = call.cos.to(dtype), call.sin.to(dtype), x_BTHD.to(dtype)
    if weight_D is not None:
        rstd_BTH1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + call.eps)
        x = x * rstd_BTH1 * (weight_D.to(dtype) + call.weight_offset)
    n = 2 * cos.shape[-1]
    first, second = (slice(0, n, 2), slice(1, n, 2)) if call.interleaved else (slice(n // 2), slice(n // 2, n))
    x1, x2 = x[..., first], x[..., second]
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = (torch.stack((y1, y2), -1).flatten(-2),) if call.interleaved else (y1, y2)
    return torch.cat((*rotated, x[..., n:]), -1).to(x_BTHD.dtype)
