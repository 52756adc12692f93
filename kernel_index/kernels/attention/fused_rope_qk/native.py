"""A few tokens on the CPU in C++: one call instead of thirty of PyTorch's."""

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.attention.fused_rope_qk.contract import Call


def rope_qk_native(call: Call) -> tuple[Tensor, Tensor]:
    return rotate(call.q, call.k, call.cos, call.sin, call.interleaved, False)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k = q.contiguous(), k.contiguous()
    cos, sin = native.floats(cos), native.floats(-sin if inverse else sin)
    rotated = torch.empty_like(q), torch.empty_like(k)
    (batch, tokens, heads, width), kv_heads, half = q.shape, k.shape[2], cos.shape[-1]
    low = q.dtype == torch.bfloat16
    sizes = (batch, tokens, heads, kv_heads, width, half, interleaved, cos.shape[0], low, native.rows_threads(q))
    native.call(native.ROWS, "rotate", sizes, (), q, k, cos, sin, *rotated)
    return rotated
