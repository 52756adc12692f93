"""The specification: a rotation of channel pairs in at least float32, one tensor at a time."""

import torch
from torch import Tensor

from kernel_index.kernels.attention.fused_rope_qk.contract import Call


def rope_qk_reference(call: Call) -> tuple[Tensor, Tensor]:
    q, k = (_rotate(x, call.cos, call.sin, call.interleaved) for x in (call.q, call.k))
    return q, k


def _rotate(x_BTHD: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, interleaved: bool) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x_BTHD.dtype, cos_BT1R.dtype), torch.float32)
    cos, sin = cos_BT1R.to(dtype), sin_BT1R.to(dtype)
    n = 2 * cos.shape[-1]
    first, second = (slice(0, n, 2), slice(1, n, 2)) if interleaved else (slice(n // 2), slice(n // 2, n))
    x = x_BTHD.to(dtype)
    x1, x2 = x[..., first], x[..., second]
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = (torch.stack((y1, y2), -1).flatten(-2),) if interleaved else (y1, y2)
    return torch.cat((*rotated, x[..., n:]), -1).to(x_BTHD.dtype)
