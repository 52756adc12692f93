"""The launch of ``triton``: in eager code it writes the new tokens too, in a trace a plain scatter has written them."""

import torch
from torch import Tensor

from kernel_index.core import device_documents, ops
from kernel_index.core.document_attention import Bounds
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall, key_intervals
from kernel_index.kvcache.slots import append


def _allocate(q, k_cache, v_cache, lengths, table, sink, new, left, right, scale, softcap):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _launch(q, k_cache, v_cache, lengths, table, sink, new, left, right, scale, softcap, written=None):
    """``written``: keys and values of the ``new`` tokens, of the same strides; None where the cache has them."""
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    out = _allocate(q, k_cache, v_cache, lengths, table, sink, new, left, right, scale, softcap)
    if out.numel() == 0:
        return out
    if k_cache.shape[1] == 0 or (table is not None and table.shape[1] == 0):
        return out.zero_()
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    q, lengths = dense_heads(q), lengths.contiguous()
    new_k = None if written is None else written[0]
    made = triton.launches_of(q, k_cache, lengths, table, new_k, sink, new, (left, right), scale, softcap)
    return triton.launch(made, q, k_cache, v_cache, lengths, table, written or (q, q), sink, out)


_decode_op = ops.register(
    "kvcache_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? table, Tensor? sink, SymInt new, "
    "int left, int right, float scale, float softcap) -> Tensor",
    _launch,
    _allocate,
)


def _decode_document(call: DecodeCall) -> Tensor:
    """A row of the cache is a document: the kernel, and so the bits, of ``attention`` over it."""
    append(call.k_cache, call.v_cache, call.cache_seqlens, call.k, call.v, call.block_table)
    total = call.cache_seqlens.to(torch.int64) + call.new_tokens
    start, end = key_intervals(total, call.q.shape[1], call.window_bounds)
    bounds = Bounds(start, end, torch.zeros_like(start))
    scoring = device_documents.Scoring(call.scale, call.softcap)
    tensors = (call.q, call.k_cache, call.v_cache, call.sink)
    return device_documents.attend_to_cache(*tensors, bounds, scoring, call.block_table)


def decode_triton(call: DecodeCall) -> Tensor:
    if is_invariant():
        return _decode_document(call)
    q, k_cache, v_cache, lengths, table = call.q, call.k_cache, call.v_cache, call.cache_seqlens, call.block_table
    numbers = (call.new_tokens, *bounds_of(call), float(call.scale), float(call.softcap))
    if call.k is None or call.v is None or ops.are_seen() or not writes_itself(call):
        append(k_cache, v_cache, lengths, call.k, call.v, table)
        return ops.run(_decode_op, _launch, q, k_cache, v_cache, lengths, table, call.sink, *numbers)
    k, v = dense_heads(call.k), dense_heads(call.v)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    out = ops.run_launcher(_launch, q, k_cache, v_cache, lengths, table, call.sink, *numbers, (k, v))
    torch.autograd.graph.increment_version([k_cache, v_cache])  # what a backward pass has saved of them is overwritten
    return out


def bounds_of(call: DecodeCall) -> tuple[int, int]:
    """The window's bounds as kernels take them: −1 is unlimited."""
    left, right = call.window_bounds
    return -1 if left is None else left, -1 if right is None else right


def writes_itself(call: DecodeCall) -> bool:
    """Whether the launch can write the new tokens: where it is short and its queries' window holds them all."""
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    queries, group = call.q.shape[1], call.q.shape[2] // call.k_cache.shape[2]
    return triton.writes_itself(queries, group, call.new_tokens) and call.q.numel() > 0
