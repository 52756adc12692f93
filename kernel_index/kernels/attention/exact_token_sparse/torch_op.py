"""The registered ops of the ``triton`` backend, and its two passes."""

import torch
from torch import Tensor

from kernel_index.core import device_documents, ops
from kernel_index.core.attention_function import (
    Backward,
    Forward,
    Gradients,
    Passes,
    attend,
    forward_by_log2,
    sink_gradient_by_log2,
)
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton.launch import dense, dense_heads
from kernel_index.kernels.attention.exact_token_sparse.contract import ExactTokenCall, Scoring
from kernel_index.kernels.attention.exact_token_sparse.geometry import TOGETHER, launch_of, padded_group
from kernel_index.kernels.attention.exact_token_sparse.selection_order import sort_selected
from kernel_index.masks.attention_arguments import sizes_of
from kernel_index.routing.token_unions import chunks_of_queries, unions_of

MOST_SORTED = 4096
"""Tokens of a query that one program sorts; PyTorch sorts more."""


def _allocate(q, k, v, indices, valid, start, end, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    log2_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    places = torch.empty(indices.shape, dtype=torch.int32, device=q.device)
    return out, log2_sum, places, torch.empty(indices.shape[:3], dtype=torch.int32, device=q.device)


def _launch(q, k, v, indices, valid, start, end, scale, softcap):
    """Plans are inside the op: compiled outside, they would be many small kernels."""
    from kernel_index.kernels.attention.exact_token_sparse import triton, triton_order, triton_unions

    out, log2_sum, selected, counts = _allocate(q, k, v, indices, valid, start, end, scale, softcap)
    q, k, v = map(dense_heads, (q, k, v))
    few = indices.shape[3] <= MOST_SORTED
    if few:
        dense_indices, dense_valid = dense_heads(indices), None if valid is None else dense_heads(valid)
        given = (dense_indices, dense_valid, start.contiguous(), end.contiguous())
        triton_order.keep_legal(*given, (selected, counts))
    else:
        selected, counts = sort_selected(indices, valid, start, end, k.shape[1])
    launches, group, limit = _launches(("forward", "single"), q, k, v, selected, scale, softcap)
    for u in _unions(q, k, selected):
        if few:  # a union needs no order: most of a selection that neighbours share is never sorted
            triton_order.sort_alone(selected, u, limit)
        triton_unions.forward(q, k, v, u, counts, limit, launches[0], group, (out, log2_sum))
        triton.forward(q, k, v, selected, counts, u, limit, launches[1], (out, log2_sum))
    return out, log2_sum, selected, counts


def _launches(kernels, q, k, v, selected, scale, softcap):
    """The geometry of these kernels, the heads of a KV head, padded, and the tokens of a union that goes together."""
    shared = selected.shape[2] == 1
    found = [launch_of(kernel, q, v, scale, softcap, shared) for kernel in kernels]
    return found, padded_group(q, k), TOGETHER * selected.shape[3]


def _unions(q, k, selected):
    """The unions of one chunk of queries after the other."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if batch * queries * heads:
        for first, some in chunks_of_queries(batch, selected.shape[2], queries, keys):
            yield unions_of(selected, keys, first, some)


def _allocate_backward(d_out, d_lse, q, k, v, out, log2_sum, places, counts, scale, softcap, with_keys):
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty(log2_sum.shape, dtype=torch.float32, device=q.device)
    return d_q, delta, *(torch.empty(x.shape if with_keys else 0, dtype=x.dtype, device=x.device) for x in (k, v))


def _launch_backward(d_out, d_lse, q, k, v, out, log2_sum, places, counts, scale, softcap, with_keys):
    """The unions of a chunk of queries serve dQ, then dK and dV."""
    from kernel_index.kernels.attention.exact_token_sparse import triton, triton_keys, triton_unions

    d_q, delta, d_k, d_v = _allocate_backward(
        d_out, d_lse, q, k, v, out, log2_sum, places, counts, scale, softcap, with_keys
    )
    d_out, q, k, v = map(dense_heads, (d_out, q, k, v))
    (d_lse,) = dense((d_lse,))
    (of_tiles, alone, of_keys), group, limit = _launches(("queries", "single", "keys"), q, k, v, places, scale, softcap)
    sums = triton_keys.sums_of(k, v) if with_keys else None
    for u in _unions(q, k, places):
        given = ((d_out, d_lse), q, k, v, out, log2_sum)
        triton_unions.backward_queries(*given, u, limit, of_tiles, group, (d_q, delta))
        triton.backward_queries(*given, places, counts, u, limit, alone, (d_q, delta))
        if sums is not None and k.shape[1] * places.shape[3]:
            of_rows = (d_out, q, k, v, log2_sum, delta)
            triton_keys.add_keys(sums, of_rows, u, places.shape[2] == 1, of_keys, group)
    if sums is not None:
        d_k.copy_(sums[..., : k.shape[3]])
        d_v.copy_(sums[..., k.shape[3] :])
    return d_q, delta, d_k, d_v


_forward_op = ops.register(
    "exact_token_fused(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? valid, Tensor start, Tensor end, "
    "float scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "exact_token_fused_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor places, Tensor counts, float scale, float softcap, bool with_keys) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_backward,
)


def _forward(
    scoring: Scoring, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, start: Tensor, end: Tensor,
    indices: Tensor, *valid: Tensor,
) -> Forward:  # fmt: skip
    out, log2_sum, slots, counts = _forward_op(q, k, v, indices, valid[0] if valid else None, start, end, *scoring)
    return forward_by_log2(out, log2_sum, sink, slots, counts)


def _backward(scoring: Scoring, given: Backward) -> Gradients:
    d_out, d_lse, q, k, v, _, out = given[:7]
    log2_sum, slots, counts = given.saved
    with_keys = given.needs[1] or given.needs[2]
    d_q, delta, *of_keys = _backward_op(d_out, d_lse, q, k, v, out, log2_sum, slots, counts, *scoring, with_keys)
    d_k, d_v = of_keys if with_keys else (None, None)
    return Gradients(d_q, d_k, d_v, sink_gradient_by_log2(given, delta))


PASSES = Passes("the triton backend of exact_token_attention", _forward, _backward)


def exact_token_triton(call: ExactTokenCall) -> tuple[Tensor, Tensor]:
    if is_invariant():
        assert call.indices is not None
        sizes = sizes_of(call.q, call.k, call.mask)
        own = call.indices if call.valid is None else torch.where(call.valid, call.indices, -1)
        own = torch.where(own < 0, -1, own - call.mask.row_origins(sizes)[:, :, None, None])
        own, scoring = own.expand(-1, -1, call.k.shape[2], -1), device_documents.Scoring(*call.scoring, 1)
        return device_documents.attend_to_mask(call.q, call.k, call.v, call.sink, call.mask, sizes, scoring, own)
    return attend(PASSES, call.scoring, call.q, call.k, call.v, call.sink, *call.selection)
