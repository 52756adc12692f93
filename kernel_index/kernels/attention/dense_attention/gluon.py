"""The ``gluon`` backend: the kernels of ``triton_hopper_*.py``, with what a mask excludes hidden before they run."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend, sink_gradient
from kernel_index.core.excluded import guarded_on_device
from kernel_index.core.triton.hopper import has_tiles
from kernel_index.kernels.attention.dense_attention import triton_hopper_backward as backward_kernels
from kernel_index.kernels.attention.dense_attention import triton_hopper_forward as forward_kernels
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.kernels.attention.dense_attention.torch_op import Scoring

ALIGNED = 64
"""The copy engine reads the log-sum-exp of so many queries together, and begins at multiples of 16 bytes."""


class Statics(NamedTuple):
    """``may_have_padding``: whether a query may see no key."""

    scoring: Scoring
    may_have_padding: bool


def _tiles(x: Tensor) -> Tensor:
    """x, or a copy: ``contiguous`` would give back what is dense but begins between two multiples of 16 bytes."""
    return x if has_tiles(x) else x.clone(memory_format=torch.contiguous_format)


def _rows_like(q: Tensor) -> Tensor:
    """float32 [B, H, T], each head's numbers at a multiple of 16 bytes."""
    B, T, H, _ = q.shape
    return q.new_empty(B, H, -(-T // ALIGNED) * ALIGNED, dtype=torch.float32)[..., :T]


def _forward(
    statics: Statics, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *bounds: Tensor
) -> Forward:  # fmt: skip
    outputs = q.new_empty(*q.shape[:3], v.shape[3]), _rows_like(q)
    q, k, v = map(_tiles, (q, k, v))
    out, log2_sum = forward_kernels.forward(q, k, v, sink, (bounds[0], bounds[1]), *statics.scoring, outputs)
    return Forward(out, log2_sum * math.log(2), (log2_sum, *bounds))


def _backward(statics: Statics, given: Backward) -> Gradients:
    log2_sum, k_start, k_end, q_start, q_end = given.saved
    scoring, d_out, q = statics.scoring, given.d_out, given.q
    if statics.may_have_padding:  # its weights are 0, and 0 · NaN would be the gradient of the keys of its tile
        m_some = (k_start < k_end)[..., None, None]
        d_out, q = torch.where(m_some, d_out, 0.0), torch.where(m_some, q, 0.0)
    d_out, q, k, v = map(_tiles, (d_out, q, given.k, given.v))
    d_lse = None if given.d_lse is None else given.d_lse.contiguous()
    outputs = q.new_empty(q.shape), _rows_like(q)
    if log2_sum.stride() != outputs[1].stride():  # what hooks on saved tensors kept elsewhere comes back without gaps
        log2_sum = _rows_like(q).copy_(log2_sum)
    d_q, delta = backward_kernels.backward_queries(
        d_out, d_lse, q, k, v, given.out, log2_sum, (k_start, k_end), *scoring, outputs
    )
    d_k = d_v = d_sink = None
    if given.needs[1] or given.needs[2]:
        outputs = k.new_empty(k.shape), v.new_empty(v.shape)
        d_k, d_v = backward_kernels.backward_keys(d_out, q, k, v, log2_sum, delta, (q_start, q_end), *scoring, outputs)
    if given.sink is not None and given.needs[3]:
        weight = torch.exp2(given.sink.to(torch.float32)[:, None] / math.log(2) - log2_sum)
        d_sink = sink_gradient(given, weight.masked_fill(log2_sum.isneginf(), 0.0), delta)
    return Gradients(d_q, d_k, d_v, d_sink)


PASSES = Passes("the gluon backend of attention", _forward, _backward)


@guarded_on_device
def attention_gluon(call: AttentionCall) -> OutAndLse:
    bounds = call.mask.row_kernel_intervals(call.sizes)
    statics = Statics(Scoring(call.scale, call.softcap), call.may_have_padding)
    return attend(PASSES, statics, call.q, call.k, call.v, call.sink, *bounds)
