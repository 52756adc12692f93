"""The registered ops of the ``triton`` backend, and its two passes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import device_documents, ops, rules
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend, sink_gradient
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.kernels.attention.dense_attention.geometry import paths_of, tile_lists
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.paths import along_paths


def _allocate(q, k, v, sink, k_start, k_end, scale, softcap, q_end=None, tiles=None):
    batch, queries, heads, _ = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)


def _launch(q, k, v, sink, k_start, k_end, scale, softcap, q_end=None, tiles=None):
    from kernel_index.kernels.attention.dense_attention import triton

    outputs = _allocate(q, k, v, sink, k_start, k_end, scale, softcap)
    q, k, v = map(launch.dense_heads, (q, k, v))
    return triton.forward(q, k, v, sink, (k_start, k_end), scale, softcap, outputs, paths_of(tiles, q_end))


def _allocate_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap, q_end=None, tiles=None):
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return d_q, torch.empty(log2_sum.shape, dtype=torch.float32, device=q.device)


def _launch_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap, q_end=None, tiles=None):
    from kernel_index.kernels.attention.dense_attention import triton_backward

    outputs = _allocate_queries(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, scale, softcap)
    d_out, q, k, v = map(launch.dense_heads, (d_out, q, k, v))
    (d_lse,) = launch.dense((d_lse,))
    return triton_backward.backward_queries(
        d_out, d_lse, q, k, v, out, log2_sum, (k_start, k_end), scale, softcap, outputs, paths_of(tiles, q_end)
    )


def _allocate_keys(
    d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap, k_start=None, k_end=None, tiles=None
):
    return torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _launch_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap, k_start=None, k_end=None, tiles=None):
    from kernel_index.kernels.attention.dense_attention import triton_backward

    outputs = _allocate_keys(d_out, q, k, v, log2_sum, delta, q_start, q_end, scale, softcap)
    d_out, q, k, v = map(launch.dense_heads, (d_out, q, k, v))
    paths = paths_of(tiles, k_start, k_end)
    return triton_backward.backward_keys(
        d_out, q, k, v, log2_sum, delta, (q_start, q_end), scale, softcap, outputs, paths
    )


_forward_op = ops.register(
    "interval_attention(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor k_start, Tensor k_end, float? scale, "
    "float softcap, Tensor? q_end=None, Tensor? tiles=None) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_queries_op = ops.register(
    "interval_attention_backward_queries(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor k_start, Tensor k_end, float? scale, float softcap, Tensor? q_end=None, "
    "Tensor? tiles=None) -> (Tensor, Tensor)",
    _launch_queries,
    _allocate_queries,
)
_keys_op = ops.register(
    "interval_attention_backward_keys(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor log2_sum, Tensor delta, "
    "Tensor q_start, Tensor q_end, float? scale, float softcap, Tensor? k_start=None, Tensor? k_end=None, "
    "Tensor? tiles=None) -> (Tensor, Tensor)",
    _launch_keys,
    _allocate_keys,
)


class Scoring(NamedTuple):
    scale: float | None
    softcap: float


def _forward(
    scoring: Scoring, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
    k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor, *tiles: Tensor,
) -> Forward:  # fmt: skip
    paths = (q_end, tiles[0]) if tiles else ()
    out, log2_sum = _forward_op(q, k, v, sink, k_start, k_end, *scoring, *paths)
    return Forward(out, log2_sum * math.log(2), (log2_sum, k_start, k_end, q_start, q_end, *tiles))


def _backward(scoring: Scoring, given: Backward) -> Gradients:
    d_out, d_lse, q, k, v, sink, out = given[:7]
    log2_sum, k_start, k_end, q_start, q_end, *tiles = given.saved
    paths = (q_end, tiles[1]) if tiles else ()
    d_q, delta = _queries_op(d_out, d_lse, q, k, v, out, log2_sum, k_start, k_end, *scoring, *paths)
    d_k = d_v = d_sink = None
    if given.needs[1] or given.needs[2]:
        paths = (k_start, k_end, tiles[2]) if tiles else ()
        d_k, d_v = _keys_op(d_out, q, k, v, log2_sum, delta, q_start, q_end, *scoring, *paths)
    if sink is not None and given.needs[3]:
        weight = torch.exp2(sink.to(torch.float32)[:, None] / math.log(2) - log2_sum)
        d_sink = sink_gradient(given, weight.masked_fill(log2_sum.isneginf(), 0.0), delta)
    return Gradients(d_q, d_k, d_v, d_sink)


PASSES = Passes("the triton backend of attention", _forward, _backward)


def attention_triton(call: AttentionCall) -> OutAndLse:
    if is_invariant():
        return _attend_to_documents(call)
    bounds = call.mask.row_kernel_intervals(call.sizes)
    is_tree = call.mask.is_tree and call.mask.row_bounds(call.sizes).q_end is not None
    tiles = _tiles_of_each_kernel(call) if is_tree else ()
    scoring = Scoring(call.scale, call.softcap)
    return attend(PASSES, scoring, call.q, call.k, call.v, call.sink, *bounds, *tiles)


def _attend_to_documents(call: AttentionCall) -> OutAndLse:
    """A branch of a prefix tree is attended to as the end of a document, its path."""
    scoring = device_documents.Scoring(scale_of(call.q, call.scale), call.softcap)

    def attend_branch(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract) -> OutAndLse:
        return device_documents.attend_to_mask(q, k, v, call.sink, mask, sizes_of(q, k, mask), scoring)

    if not call.mask.is_tree:
        return attend_branch(call.q, call.k, call.v, call.mask)
    by_key = call.k, call.v
    found = along_paths("attention", attend_branch, call.mask, call.sizes, (call.q,), by_key, (1, 2), (0.0, -math.inf))
    return found[0], found[1]


def _tiles_of_each_kernel(call: AttentionCall) -> tuple[Tensor, ...]:
    """The lists of ``Paths.tiles`` for ``forward`` and, where a gradient is wanted, ``queries`` and ``keys``."""
    q, k, v, sizes = call.q, call.k, call.v, call.sizes
    kernels = ("forward", "queries", "keys") if rules.wants_gradient(q, k, v, call.sink) else ("forward",)
    return tuple(tile_lists(kernel, q, k, v, call.mask, sizes) for kernel in kernels)
