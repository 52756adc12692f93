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
    with launch.on_device(k):
        triton.append(k_cache, v_cache, means, k, v, Visible(lengths, table, k.shape[1], -1), block_size)
    if not k_cache.is_inference():  # autograd must notice that what a backward pass has saved was overwritten
        torch.autograd.graph.increment_version([k_cache, v_cache])


_append_op = ops.register(
    "append_with_block_means(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) means, Tensor k, Tensor v, "
    "Tensor lengths, Tensor? table, int block_size) -> ()",
    _append,
    _nothing,
)


def _allocate(
    q, k_cache, v_cache, means, k, v, lengths, table, new, left, block_size, topk, groups, scale, softcap, sink=None
):  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _step(q, k_cache, v_cache, means, k, v, lengths, table, new, left, block_size, topk, groups, scale, softcap,
          sink=None):  # fmt: skip
    from kernel_index.kernels.sparse.moba_block_sparse import triton

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seen, q = Visible(lengths, table, new, left), launch.dense_heads(q)
    with launch.on_device(q):
        if k is not None:
            _append(k_cache, v_cache, means, k, v, lengths, table, block_size)
        if out.numel() == 0:
            return out
        return triton.step(q, k_cache, v_cache, means, seen, block_size, topk, groups, scale, softcap, sink, out)


_step_op = ops.register(
    "moba_step(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) means, Tensor? k, Tensor? v, "
    "Tensor lengths, Tensor? table, int new, int left, int block_size, int topk, int groups, float scale, "
    "float softcap, Tensor? sink=None) -> Tensor",
    _step,
    _allocate,
)


def write(call: MobaDecodeCall, means: Tensor) -> None:
    """Write the new keys and values, and the means [rows or pages, units, K, D] of the blocks that they complete."""
    cache = call.cache
    if call.k is not None and call.v is not None:
        caches, tables = (cache["k_cache"], cache["v_cache"]), (cache["cache_seqlens"], cache["block_table"])
        ops.run(_append_op, _append, *caches, means, call.k.detach(), call.v.detach(), *tables, call.block_size)


def step(call: MobaDecodeCall, means: Tensor) -> Tensor:
    """``write``, then attention over the blocks that each query selects."""
    cache, left = call.cache, call.window[0]
    args = (call.q, cache["k_cache"], cache["v_cache"], means, call.k, call.v)
    args = (*args, cache["cache_seqlens"], cache["block_table"], cache.new_tokens, -1 if left is None else left)
    more = (call.block_size, call.topk, call.groups, float(call.scale), float(call.softcap), call.sink)
    with torch.no_grad():
        return ops.run(_step_op, _step, *args, *more)
