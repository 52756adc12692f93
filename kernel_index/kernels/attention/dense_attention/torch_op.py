"""The registered ops of the ``triton`` backend, and its two passes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend, sink_gradient
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse


def _allocate(q, k, v, sink, k_start, k_end, scale, softcap):
    batch, queries, heads, _ = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)


def _launch(q, k, v, sink, k_start, k_end, scale, softcap):
    from kernel_index.kernels.attention.dense_attention import triton

    outputs = _allocate(q, k, v, sink, k_start, k_end, scale, softcap)
    q, k, v = map(launch.dense_heads, (q, k, v))
    return triton.forward(q, k, v, sink, k_start, k_end, scale, softcap, outputs)


def _allocate_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap):
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return d_q, torch.empty(log2_sum.shape, dtype=torch.float32, device=q.device)


def _launch_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap):
    from kernel_index.kernels.attention.dense_attention import triton

    outputs = _allocate_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap)
    d_out, q, k, v = map(launch.dense_heads, (d_out, q, k, v))
    (d_lse,) = launch.dense((d_lse,))
    return triton.backward_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap, outputs)


def _allocate_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap):
    return torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _launch_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap):
    from kernel_index.kernels.attention.dense_attention import triton

    outputs = _allocate_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap)
    d_out, q, k, v = map(launch.dense_heads, (d_out, q, k, v))
    return triton.backward_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap, outputs)


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


class _Scoring(NamedTuple):
    scale: float | None
    softcap: float


def _forward(
    scoring: _Scoring, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
    k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor,
) -> Forward:  # fmt: skip
    out, log2_sum = _forward_op(q, k, v, sink, k_start, k_end, *scoring)
    return Forward(out, log2_sum * math.log(2), (log2_sum, k_start, k_end, q_start, q_end))


def _backward(scoring: _Scoring, given: Backward) -> Gradients:
    d_out, d_lse, q, k, v, sink, out = given[:7]
    log2_sum, k_start, k_end, q_start, q_end = given.saved
    d_q, delta = _queries_op(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, *scoring)
    d_k = d_v = d_sink = None
    if given.needs[1] or given.needs[2]:
        d_k, d_v = _keys_op(d_out, q, k, v, log2_sum, delta, q_start, q_end, *scoring)
    if sink is not None and given.needs[3]:
        weight = torch.exp2(sink.to(torch.float32)[:, None] / math.log(2) - log2_sum)
        d_sink = sink_gradient(given, weight.masked_fill(log2_sum.isneginf(), 0.0), delta)
    return Gradients(d_q, d_k, d_v, d_sink)


PASSES = Passes("the triton backend of attention", _forward, _backward)


def attention_triton(call: AttentionCall) -> OutAndLse:
    bounds = call.mask.row_kernel_intervals(call.sizes)
    scoring = _Scoring(call.scale, call.softcap)
    return attend(PASSES, scoring, call.q, call.k, call.v, call.sink, *bounds)
