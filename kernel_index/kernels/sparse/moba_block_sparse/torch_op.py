"""The registered ops of the Triton backend of ``moba_decode``: they write the cache and its block means, and attend."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaDecodeCall
from kernel_index.kvcache.selected import Visible


def _nothing(k_cache, v_cache, means, k, v, lengths, table, block_size):
    return None


def _append(k_cache, v_cache, means, k, v, lengths, table, block_size):
    from kernel_index.kernels.sparse.moba_block_sparse import triton

    if k.numel() == 0:
        return
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = launch.dense((k, v))
    triton.append(k_cache, v_cache, means, k, v, Visible(lengths, table, k.shape[1], -1), block_size)
    if not k_cache.is_inference():  # autograd must notice that what a backward pass has saved was overwritten
        torch.autograd.graph.increment_version([k_cache, v_cache])


_append_op = ops.register(
    "append_with_block_means(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) means, Tensor k, Tensor v, "
    "Tensor lengths, Tensor? table, int block_size) -> ()",
    _append,
    _nothing,
)


def _allocate(q, k_cache, v_cache, means, lengths, table, new, left, block_size, topk, groups, scale, softcap):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _attend(q, k_cache, v_cache, means, lengths, table, new, left, block_size, topk, groups, scale, softcap):
    from kernel_index.kernels.sparse.moba_block_sparse import triton

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seen, q = Visible(lengths, table, new, left), launch.dense_heads(q)
    return triton.step(q, k_cache, v_cache, means, seen, block_size, topk, groups, scale, softcap, out)


_attend_op = ops.register(
    "route_and_attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor means, Tensor lengths, Tensor? table, int new, "
    "int left, int block_size, int topk, int groups, float scale, float softcap) -> Tensor",
    _attend,
    _allocate,
)


def write(call: MobaDecodeCall, means: Tensor) -> None:
    """Write the new keys and values, and the means [rows or pages, units, K, D] of the blocks that they complete."""
    cache = call.cache
    if call.k is not None and call.v is not None:
        caches, tables = (cache["k_cache"], cache["v_cache"]), (cache["cache_seqlens"], cache["block_table"])
        ops.run(_append_op, _append, *caches, means, call.k.detach(), call.v.detach(), *tables, call.block_size)


def attend(call: MobaDecodeCall, means: Tensor) -> Tensor:
    """Attention over the blocks that each query selects, of a cache whose keys and block means are written."""
    cache, left = call.cache, call.window[0]
    args = (call.q, cache["k_cache"], cache["v_cache"], means, cache["cache_seqlens"], cache["block_table"])
    more = (cache.new_tokens, -1 if left is None else left, call.block_size, call.topk, call.groups)
    return ops.run(_attend_op, _attend, *args, *more, float(call.scale), float(call.softcap))
