"""Decoding on the CPU in C++: one pass over the block means, then one over the selected keys, read in the cache itself.

A prompt's many queries go to the block-sparse core instead, row by row, as in ``cpu``.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaDecodeCall
from kernel_index.kernels.sparse.moba_block_sparse.decoding import PROMPT, attend_prompt, route
from kernel_index.kvcache.slots import append
from kernel_index.routing.legal_blocks import num_blocks

SOURCE = Path(__file__).with_name("moba_decode.cpp")


def decode_native(call: MobaDecodeCall) -> Tensor:
    if call.q.shape[1] > PROMPT:
        return attend_prompt(call, route(call).selected)
    cache, left = call.cache, call.window[0]
    lengths, table, k_cache, v_cache = (cache[n] for n in ("cache_seqlens", "block_table", "k_cache", "v_cache"))
    with torch.no_grad():
        append(k_cache, v_cache, lengths, call.k, call.v, table)
        means = cache.block_means(call.block_size)
    (batch, queries, heads, width), (page, kv_heads) = call.q.shape, k_cache.shape[1:3]
    topk = min(call.topk, max(1, num_blocks(max(cache.lengths_after, default=0), call.block_size)))
    block_size = min(call.block_size, max(1, *cache.lengths_after, page))  # of a block that holds all, any size serves
    pages = 0 if table is None else table.shape[1]
    sizes = (batch, queries, heads, kv_heads, call.groups, width, block_size, topk, page, pages, means.stride(0))
    sizes = (*sizes, means.shape[1], cache.new_tokens, -1 if left is None else left, torch.get_num_threads())
    q = call.q.contiguous()
    out = torch.empty_like(q)
    table = lengths if table is None else table.contiguous()
    function = f"moba_decode_{native.suffix(q.dtype)}"
    sink = q.new_full((heads,), -torch.inf, dtype=torch.float32) if call.sink is None else native.floats(call.sink)
    tensors = (lengths, table, q, k_cache, v_cache, means, sink, out)
    native.call(SOURCE, function, sizes, (call.scale, call.softcap), *tensors)
    return out
