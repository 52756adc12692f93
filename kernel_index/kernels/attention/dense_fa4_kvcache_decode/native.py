"""A decoding step on the CPU in C++: it reads keys and values in the cache itself, page by page, without a gather.

A row has splits of 256 keys, which are shared among the threads and merged in order: the same bits for any number of
threads.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall

SOURCE = Path(__file__).with_name("decode.cpp")


def decode_native(call: DecodeCall) -> Tensor:
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
