"""The registered ops of the ``triton`` backend, and its two passes."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.attention.exact_token_sparse.contract import ExactTokenCall, Scoring
from kernel_index.kernels.attention.exact_token_sparse.selection_order import inverse_selection, sort_selected


def _allocate(q, k, v, indices, valid, start, end, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    log2_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    places = torch.empty(indices.shape, dtype=torch.int32, device=q.device)
    return out, log2_sum, places, torch.empty(indices.shape[:3], dtype=torch.int32, device=q.device)


def _launch(q, k, v, indices, valid, start, end, scale, softcap):
    """The sort is inside the op: compiled outside, it would be many small kernels."""
    from kernel_index.kernels.attention.exact_token_sparse import triton

    outputs = _allocate(q, k, v, indices, valid, start, end, scale, softcap)[:2]
    q, k, v = map(dense_heads, (q, k, v))
    sorted_tokens = sort_selected(indices, valid, start, end, k.shape[1])
    triton.forward(q, k, v, *sorted_tokens, scale, softcap, outputs)
    return *outputs, *sorted_tokens


def _allocate_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap):
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return d_q, torch.empty(log2_sum.shape, dtype=torch.float32, device=q.device)


def _launch_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap):
    from kernel_index.kernels.attention.exact_token_sparse import triton

    outputs = _allocate_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap)
    d_out, q, k, v = map(dense_heads, (d_out, q, k, v))
    return triton.backward_queries(d_out, q, k, v, out, log2_sum, places, counts, scale, softcap, outputs)


def _allocate_keys(d_out, q, k, v, log2_sum, delta, places, scale, softcap):
    return torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _launch_keys(d_out, q, k, v, log2_sum, delta, places, scale, softcap):
    from kernel_index.kernels.attention.exact_token_sparse import triton

    outputs = _allocate_keys(d_out, q, k, v, log2_sum, delta, places, scale, softcap)
    d_out, q, k, v = map(dense_heads, (d_out, q, k, v))
    queries, first = inverse_selection(places, k.shape[1])
    return triton.backward_keys(d_out, q, k, v, log2_sum, delta, queries, first, scale, softcap, outputs)


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


def _forward(
    scoring: Scoring, q: Tensor, k: Tensor, v: Tensor, sink: None, start: Tensor, end: Tensor, indices: Tensor,
    *valid: Tensor,
) -> Forward:  # fmt: skip
    out, log2_sum, slots, counts = _forward_op(q, k, v, indices, valid[0] if valid else None, start, end, *scoring)
    return Forward(out, log2_sum.detach(), (log2_sum, slots, counts))


def _backward(scoring: Scoring, given: Backward) -> Gradients:
    # The log-sum-exp is not handed out: d_lse is None, or the zeros that torch.compile makes of it.
    d_out, _, q, k, v, _, out = given[:7]
    log2_sum, slots, counts = given.saved
    d_q, delta = _queries_op(d_out, q, k, v, out, log2_sum, slots, counts, *scoring)
    d_k = d_v = None
    if given.needs[1] or given.needs[2]:
        d_k, d_v = _keys_op(d_out, q, k, v, log2_sum, delta, slots, *scoring)
    return Gradients(d_q, d_k, d_v)


PASSES = Passes("the triton backend of exact_token_attention", _forward, _backward)


def exact_token_triton(call: ExactTokenCall) -> Tensor:
    return attend(PASSES, call.scoring, call.q, call.k, call.v, None, *call.selection)[0]
