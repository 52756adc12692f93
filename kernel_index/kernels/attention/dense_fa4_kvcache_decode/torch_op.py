"""The registered op of ``triton``: it only reads the cache, which a plain scatter has written before."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall
from kernel_index.kvcache.slots import append


def _allocate(q, k_cache, v_cache, lengths, table, new, left, right, softcap):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _launch(q, k_cache, v_cache, lengths, table, new, left, right, softcap):
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    out = _allocate(q, k_cache, v_cache, lengths, table, new, left, right, softcap)
    q, k_cache, v_cache = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    return triton.decode(q, k_cache, v_cache, lengths.contiguous(), table, new, left, right, softcap, out)


_decode_op = ops.register(
    "kvcache_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? table, SymInt new, int left, "
    "int right, float softcap) -> Tensor",
    _launch,
    _allocate,
)


def decode_triton(call: DecodeCall) -> Tensor:
    q, k_cache, v_cache, lengths, table = call.q, call.k_cache, call.v_cache, call.cache_seqlens, call.block_table
    append(k_cache, v_cache, lengths, call.k, call.v, table)
    left, right = (-1 if side is None else side for side in call.window_bounds)
    return _decode_op(q, k_cache, v_cache, lengths, table, call.new_tokens, left, right, float(call.softcap))
