"""Decoding on the CPU in C++: a step is one pass over the means and one over the picked keys, where they lie.

A prompt's many queries go to the block-sparse core instead, row by row, as in ``cpu``.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.sparse.moba_block_sparse.decoding import PROMPT, prompt, route
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.slots import append
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.masks.doc_window_mask.contract import Window
from kernel_index.routing.legal_blocks import num_blocks

SOURCE = Path(__file__).with_name("moba_decode.cpp")


def decode_native(
    q: Tensor,
    cache: CacheLayer,
    k: Tensor | None,
    v: Tensor | None,
    block_size: int,
    topk: int,
    window: Window,
    groups: int,
    scale: float | None,
    softcap: float,
) -> Tensor:
    if q.shape[1] > PROMPT:
        routed = route(q, cache, k, v, block_size, topk, window, groups)
        return prompt(q, cache, routed, block_size, window, scale, softcap)
    lengths, table = cache["cache_seqlens"], cache["block_table"]
    k_cache, v_cache = cache["k_cache"], cache["v_cache"]
    with torch.no_grad():
        append(k_cache, v_cache, lengths, k, v, table)
        means = cache.block_means(block_size)
    (batch, queries, heads, width), (page, kv_heads) = q.shape, k_cache.shape[1:3]
    topk = min(topk, max(1, num_blocks(max(cache.lengths_after, default=0), block_size)))
    block_size = min(block_size, max(1, *cache.lengths_after, page))  # one block holds all: its size is no matter
    left = -1 if window[0] is None else window[0]
    pages = 0 if table is None else table.shape[1]
    sizes = (batch, queries, heads, kv_heads, groups, width, block_size, topk, page, pages, means.stride(0))
    sizes = (*sizes, means.shape[1], cache.new_tokens, left, torch.get_num_threads())
    q = q.contiguous()
    out = torch.empty_like(q)
    some_table = lengths if table is None else table.contiguous()
    function = f"moba_decode_{native.suffix(q.dtype)}"
    tensors = (lengths, some_table, q, k_cache, v_cache, means, out)
    native.call(SOURCE, function, sizes, (scale_of(q, scale), softcap), *tensors)
    return out
