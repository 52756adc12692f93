"""flash-attn-4 inside ``torch.compile``, for masks without a tensor: registered ops around its two passes.

Each op does what ``fa4.py`` does in eager code.  Values that are not finite are part of it, by two launches of ours: in
plain PyTorch that rule took a quarter of a step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.masks.attention_arguments import scale_of


class Band(NamedTuple):
    scale: float
    softcap: float
    causal: bool
    left: int | None
    right: int | None


def _allocate(q, k, v, *_):
    B, T, H, _ = q.shape
    S, K = k.shape[1:3]
    out, lse = q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)
    keys = q.new_empty(B, K, S, dtype=torch.int8), q.new_empty(1, dtype=torch.int32)
    return out, lse, k.new_empty(k.shape), v.new_empty(v.shape), *keys


def _launch(q, k, v, start, end, *band):
    from kernel_index.core.triton.excluded import finite_keys, mark_rows
    from kernel_index.kernels.attention.dense_attention.fa4 import forward_pass

    k, v, keys = finite_keys(dense_heads(k), dense_heads(v), copy_k=True)
    out, lse = forward_pass(q.contiguous(), k, v, *band)
    mark_rows(out, lse, keys, start, end)
    return out, lse, k, v, *keys


def _allocate_backward(d_out, d_lse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _launch_backward(d_out, d_lse, q, k, v, out, lse, bad, some, start, end, *band):
    from kernel_index.core.triton.excluded import BadKeys, mark_rows
    from kernel_index.kernels.attention.dense_attention.fa4 import backward_pass

    d_lse = None if d_lse is None else d_lse.contiguous()
    d_q, d_k, d_v = backward_pass(d_out.contiguous(), d_lse, q.contiguous(), k, v, out, lse, *band)
    mark_rows(d_q, None, BadKeys(bad, some), start, end)
    return d_q, d_k, d_v


_forward_op = ops.register(
    "fa4_band(Tensor q, Tensor k, Tensor v, Tensor start, Tensor end, float scale, float softcap, bool causal, "
    "int? left, int? right) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "fa4_band_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bad, "
    "Tensor some, Tensor start, Tensor end, float scale, float softcap, bool causal, int? left, int? right) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_backward,
)


def _forward(band: Band, q: Tensor, k: Tensor, v: Tensor, sink: None, start: Tensor, end: Tensor) -> Forward:
    out, lse, *kept = _forward_op(q, k, v, start, end, *band)
    return Forward(out, lse, (lse, *kept, start, end))


def _backward(band: Band, given: Backward) -> Gradients:
    lse, k, v, bad, some, start, end = given.saved
    found = _backward_op(given.d_out, given.d_lse, given.q, k, v, given.out, lse, bad, some, start, end, *band)
    return Gradients(*found)


PASSES = Passes("the fa4 backend of attention", _forward, _backward)


def attention_fa4_traced(call: AttentionCall) -> OutAndLse:
    """A call whose ``fa4_form`` is ``band``, without a sink and without queries that see nothing."""
    left, right = call.mask.window_bounds_within(call.sizes)
    causal, windowed = right == 0, left is not None or right not in (None, 0)
    band = Band(scale_of(call.q, call.scale), call.softcap, causal, *((left, right) if windowed else (None, None)))
    start, end, _ = call.mask.row_bounds(call.sizes)
    return attend(PASSES, band, call.q, call.k, call.v, None, start, end)
