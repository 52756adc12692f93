"""The launch of ``triton``: in eager code it writes the new tokens too, in a trace a plain scatter has written them."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall
from kernel_index.kvcache.slots import append


def _allocate(q, k_cache, v_cache, lengths, table, sink, new, left, right, scale, softcap):
    return q.new_empty(q.shape)


def _launch(q, k_cache, v_cache, lengths, table, sink, new, left, right, scale, softcap, written=None):
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    out = _allocate(q, k_cache, v_cache, lengths, table, sink, new, left, right, scale, softcap)
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    numbers = (new, (left, right), scale, softcap)
    return triton.decode(dense_heads(q), k_cache, v_cache, lengths.contiguous(), table, written, sink, *numbers, out)


_decode_op = ops.register(
    "kvcache_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? table, Tensor? sink, SymInt new, "
    "int left, int right, float scale, float softcap) -> Tensor",
    _launch,
    _allocate,
)


def decode_triton(call: DecodeCall) -> Tensor:
    q, k_cache, v_cache, lengths, table = call.q, call.k_cache, call.v_cache, call.cache_seqlens, call.block_table
    left, right = (-1 if side is None else side for side in call.window_bounds)
    numbers = (call.new_tokens, left, right, float(call.scale), float(call.softcap))
    if call.k is None or call.v is None or ops.are_seen() or not _writes_itself(call):
        append(k_cache, v_cache, lengths, call.k, call.v, table)
        return ops.run(_decode_op, _launch, q, k_cache, v_cache, lengths, table, call.sink, *numbers)
    k, v = dense_heads(call.k), dense_heads(call.v)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    out = ops.run_launcher(_launch, q, k_cache, v_cache, lengths, table, call.sink, *numbers, (k, v))
    torch.autograd.graph.increment_version([k_cache, v_cache])  # what a backward pass has saved of them is overwritten
    return out


def _writes_itself(call: DecodeCall) -> bool:
    """Whether the launch can write the new tokens: where it is short and its queries' window holds them all."""
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    queries, group = call.q.shape[1], call.q.shape[2] // call.k_cache.shape[2]
    return triton.writes_itself(queries, group, call.new_tokens) and call.q.numel() > 0
