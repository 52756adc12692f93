"""A decoding step on the CPU in C++: keys and values are read where they lie, page by page, and nothing is gathered.

A row is cut into parts of 256 keys, which threads share out and which are joined in their order: the same bits for any
number of threads.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import reach_of
from kernel_index.masks.doc_window_mask.contract import Window

SOURCE = Path(__file__).with_name("decode.cpp")


def decode_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool,
    window: Window,
    softcap: float,
    table: Tensor | None,
) -> Tensor:
    (batch, queries, heads, width), (page, kv_heads) = q.shape, k_cache.shape[1:3]
    reach = (-1 if side is None else side for side in reach_of(causal, window))
    pages, added = (0 if table is None else table.shape[1]), (0 if k is None else k.shape[1])
    sizes = (batch, queries, heads, kv_heads, width, page, pages, added, *reach, torch.get_num_threads())
    q = q.detach().contiguous()
    out = torch.empty_like(q)
    new_k, new_v = (q if x is None else x.detach().contiguous() for x in (k, v))
    lengths = lengths.to(torch.int32).contiguous()
    some_table = lengths if table is None else table.to(torch.int32).contiguous()
    tensors = (lengths, some_table, q, new_k, new_v, k_cache, v_cache, out)
    native.call(SOURCE, f"decode_{native.suffix(q.dtype)}", sizes, (width**-0.5, softcap), *tensors)
    if added:  # what a backward pass has saved of the cache, it must know to be overwritten
        torch.autograd.graph.increment_version([k_cache, v_cache])
    return out
