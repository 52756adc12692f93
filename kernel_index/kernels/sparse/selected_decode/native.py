"""Decoding on the CPU in C++: the selected keys and values are read in the cache itself, through the page table."""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall
from kernel_index.kernels.sparse.selected_decode.selection import write_new_tokens

SOURCE = Path(__file__).with_name("selected_decode.cpp")


def selected_decode_native(call: SelectedDecodeCall) -> Tensor:
    write_new_tokens(call)
    cache, left = call.cache, call.window[0]
    lengths, table, k_cache, v_cache = (cache[n] for n in ("cache_seqlens", "block_table", "k_cache", "v_cache"))
    (batch, queries, heads, width), (page, kv_heads) = call.q.shape, k_cache.shape[1:3]
    groups, count = call.indices.shape[2:]
    block_size = min(call.block_size, max(1, *cache.lengths_after, page))  # of a block that holds all, any size serves
    sizes = (batch, queries, heads, kv_heads, width, page, 0 if table is None else table.shape[1], cache.new_tokens)
    sizes = (*sizes, block_size, count, groups, -1 if left is None else left, torch.get_num_threads())
    q, indices = call.q.contiguous(), call.indices.to(torch.int64).contiguous()
    out = torch.empty_like(q)
    tensors = (lengths, lengths if table is None else table.contiguous(), q, k_cache, v_cache, indices, out)
    native.call(SOURCE, f"selected_decode_{native.suffix(q.dtype)}", sizes, (call.scale, call.softcap), *tensors)
    return out
