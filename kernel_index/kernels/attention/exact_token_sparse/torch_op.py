"""The registered ops behind ``triton`` and their autograd Function."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.kernels.attention.exact_token_sparse.picks import pickers_of, sorted_picks
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract


def _allocate(q, k, v, indices, valid, start, end, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    log2_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    places = torch.empty(indices.shape, dtype=torch.int32, device=q.device)
    return out, log2_sum, places, torch.empty(indices.shape[:3], dtype=torch.int32, device=q.device)


def _launch(q, k, v, indices, valid, start, end, scale, softcap):
    """The sort is inside the op: compiled, it would be many small kernels around PyTorch's own."""
    from kernel_index.kernels.attention.exact_token_sparse import triton

    outputs = _allocate(q, k, v, indices, valid, start, end, scale, softcap)[:2]
    q, k, v = map(_dense_heads, (q, k, v))
    picks = sorted_picks(indices, valid, start, end, k.shape[1])
    triton.forward(q, k, v, picks.places, picks.counts, scale, softcap, outputs)
    return *outputs, *picks


def _allocate_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap):
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return d_q, torch.empty(log2_sum.shape, dtype=torch.float32, device=q.device)


def _launch_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap):
    from kernel_index.kernels.attention.exact_token_sparse import triton

    outputs = _allocate_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap)
    d_out, q, k, v = map(_dense_heads, (d_out, q, k, v))
    return triton.backward_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap, outputs)


def _allocate_keys(d_out, q, k, v, log2_sum, delta, places, scale, softcap):
    return torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _launch_keys(d_out, q, k, v, log2_sum, delta, places, scale, softcap):
    from kernel_index.kernels.attention.exact_token_sparse import triton

    outputs = _allocate_keys(d_out, q, k, v, log2_sum, delta, places, scale, softcap)
    d_out, q, k, v = map(_dense_heads, (d_out, q, k, v))
    queries, first = pickers_of(places, k.shape[1])
    return triton.backward_keys(d_out, q, k, v, log2_sum, delta, queries, first, scale, softcap, outputs)


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any stride but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()


_forward_op = ops.register(
    "exact_token_fused(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? valid, Tensor start, Tensor end, "
    "float scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _allocate,
)
_queries_op = ops.register(
    "exact_token_fused_backward_queries(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log2_sum, "
    "Tensor places, Tensor counts, float scale, float softcap) -> (Tensor, Tensor)",
    _launch_queries,
    _allocate_queries,
)
_keys_op = ops.register(
    "exact_token_fused_backward_keys(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor log2_sum, Tensor delta, "
    "Tensor places, float scale, float softcap) -> (Tensor, Tensor)",
    _launch_keys,
    _allocate_keys,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, indices, valid, start, end, scale, softcap):
        out, log2_sum, places, counts = _forward_op(q, k, v, indices, valid, start, end, scale, softcap)
        ctx.save_for_backward(q, k, v, places, counts, out, log2_sum)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("exact_token_attention on triton cannot differentiate twice: use backend='reference'")
        q, k, v, places, counts, out, log2_sum = ctx.saved_tensors
        tail = ctx.scale, ctx.softcap
        d_q, delta = _queries_op(d_out, q, k, v, out, log2_sum, places, counts, *tail)
        d_k = d_v = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_k, d_v = _keys_op(d_out, q, k, v, log2_sum, delta, places, *tail)
        return d_q, d_k, d_v, *[None] * 6


def exact_token_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    valid: Tensor | None,
    mask: MaskContract,
    scale: float | None,
    softcap: float,
    *_: Any,
) -> Tensor:
    bounds = mask.row_intervals(sizes_of(q, k, mask))
    return _Attention.apply(q, k, v, indices, valid, *bounds, scale_of(q, scale), softcap)
