"""The registered ops behind ``triton`` and their autograd Function."""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.masks.attention_arguments import sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract


def _allocate(q, k, v, sink, k_start, k_end, scale, softcap):
    batch, queries, heads, _ = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)


def _launch(q, k, v, sink, k_start, k_end, scale, softcap):
    from kernel_index.kernels.attention.dense_attention import triton

    outputs = _allocate(q, k, v, sink, k_start, k_end, scale, softcap)
    q, k, v = map(_dense_heads, (q, k, v))
    return triton.forward(q, k, v, sink, k_start, k_end, scale, softcap, outputs)


def _allocate_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap):
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return d_q, torch.empty(log2_sum.shape, dtype=torch.float32, device=q.device)


def _launch_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap):
    from kernel_index.kernels.attention.dense_attention import triton

    outputs = _allocate_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap)
    d_out, q, k, v = map(_dense_heads, (d_out, q, k, v))
    (d_lse,) = launch.dense((d_lse,))
    return triton.backward_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap, outputs)


def _allocate_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap):
    return torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _launch_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap):
    from kernel_index.kernels.attention.dense_attention import triton

    outputs = _allocate_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap)
    d_out, q, k, v = map(_dense_heads, (d_out, q, k, v))
    return triton.backward_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap, outputs)


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any stride but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()


_forward_op = ops.register(
    "interval_attention(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor k_start, Tensor k_end, float? scale, "
    "float softcap) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_queries_op = ops.register(
    "interval_attention_backward_queries(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor k_start, Tensor k_end, float? scale, float softcap) -> (Tensor, Tensor)",
    _launch_queries,
    _allocate_queries,
)
_keys_op = ops.register(
    "interval_attention_backward_keys(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor log2_sum, Tensor delta, "
    "Tensor q_start, Tensor q_end, float? scale, float softcap) -> (Tensor, Tensor)",
    _launch_keys,
    _allocate_keys,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        k_start: Tensor,
        k_end: Tensor,
        q_start: Tensor,
        q_end: Tensor,
        scale: float | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, log2_sum = _forward_op(q, k, v, sink, k_start, k_end, scale, softcap)
        ctx.save_for_backward(q, k, v, sink, out, log2_sum, k_start, k_end, q_start, q_end)
        ctx.scale, ctx.softcap = scale, softcap
        return out, log2_sum * math.log(2)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the triton backend of attention cannot differentiate twice: use backend='reference'")
        q, k, v, sink, out, log2_sum, k_start, k_end, q_start, q_end = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        tail = ctx.scale, ctx.softcap
        d_q, delta = _queries_op(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, *tail)
        d_k = d_v = d_sink = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_k, d_v = _keys_op(d_out, q, k, v, log2_sum, delta, q_start, q_end, *tail)
        if sink is not None and ctx.needs_input_grad[3]:
            share = torch.exp2(sink.to(torch.float32)[:, None] / math.log(2) - log2_sum)
            share = share.masked_fill(log2_sum.isneginf(), 0.0)  # a query without keys has no denominator
            d_sink = -(share * delta).sum((0, 2)).to(sink.dtype)
        return d_q, d_k, d_v, d_sink, None, None, None, None, None, None


def attention_with_lse_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    bounds = mask.row_kernel_intervals(sizes_of(q, k, mask))
    return _Attention.apply(q, k, v, sink, *bounds, scale, softcap)


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> Tensor:
    return attention_with_lse_triton(q, k, v, mask, scale, softcap, sink)[0]
