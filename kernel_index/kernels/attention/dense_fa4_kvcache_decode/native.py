"""A decoding step on the CPU in C++: it reads keys and values in the cache itself, page by page, without a gather.

A row has splits of 256 keys, which are shared among the threads and merged in order: the same bits for any number of
threads.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.core.document_attention import document_attention
from kernel_index.core.excluded import Sight, guarded, sight_of_intervals
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall, key_intervals
from kernel_index.kvcache.slots import append, gathered

SOURCE = Path(__file__).with_name("decode.cpp")


def decode_native(call: DecodeCall) -> Tensor:
    if is_invariant():
        return _decode_document(call)
    k_cache, v_cache, table = call.k_cache, call.v_cache, call.block_table
    (batch, queries, heads, width), (page, kv_heads) = call.q.shape, k_cache.shape[1:3]
    bounds = (-1 if side is None else side for side in call.window_bounds)
    pages, added = (0 if table is None else table.shape[1]), call.new_tokens
    sizes = (batch, queries, heads, kv_heads, width, page, pages, added, *bounds, torch.get_num_threads())
    q = call.q.detach().contiguous()
    out = torch.empty_like(q)
    new_k, new_v = (q if x is None else x.detach().contiguous() for x in (call.k, call.v))
    lengths = call.cache_seqlens.to(torch.int32).contiguous()
    table = lengths if table is None else table.to(torch.int32).contiguous()
    if call.sink is None:
        sink = torch.full((heads,), -torch.inf, dtype=torch.float32, device=q.device)
    else:
        sink = native.floats(call.sink.detach())
    tensors = (lengths, table, q, new_k, new_v, k_cache, v_cache, sink, out)
    native.call(SOURCE, f"decode_{native.suffix(q.dtype)}", sizes, (call.scale, call.softcap), *tensors)
    if added:  # autograd must notice that what a backward pass has saved of the cache was overwritten
        torch.autograd.graph.increment_version([k_cache, v_cache])
    return out


class _Cached(NamedTuple):
    """Queries, and the tokens of each row up to the longest; query t sees ``start ≤ s < end``."""

    q: Tensor  # [B, Lq, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor
    start: Tensor  # int32 [B, Lq]
    end: Tensor
    call: DecodeCall

    @property
    def excludes(self) -> bool:
        return True

    def sight(self) -> Sight:
        return sight_of_intervals(self.start, self.end)


def _decode_document(call: DecodeCall) -> Tensor:
    """A row of the cache is a document: the kernel, and so the bits, of ``attention`` over it."""
    append(call.k_cache, call.v_cache, call.cache_seqlens, call.k, call.v, call.block_table)
    total = call.cache_seqlens.to(torch.int64) + call.new_tokens
    longest = int(total.max()) if total.numel() else 0
    table = call.block_table
    if table is not None:
        table = table[:, : -(-longest // call.k_cache.shape[1])]
    keys, values = (gathered(cache, table)[:, :longest] for cache in (call.k_cache, call.v_cache))
    start, end = key_intervals(total, call.q.shape[1], call.window_bounds)
    return _attend(_Cached(call.q, keys, values, start.to(torch.int32), end.to(torch.int32), call))


@guarded  # slots that hold no token may be NaN
def _attend(cached: _Cached) -> Tensor:
    q, keys, values, start, end, call = cached
    start = torch.minimum(start, end)
    bounds = start, end, torch.zeros_like(start)
    return document_attention(q, keys, values, call.sink, *bounds, None, call.scale, call.softcap, 1)[0]
