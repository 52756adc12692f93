"""The registered op of ``triton``: it reads the cache, which was written before, and the selected blocks."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall
from kernel_index.kernels.sparse.selected_decode.selection import distinct, write_new_tokens
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.selected import query_positions, window_starts


def _allocate(q, k_cache, v_cache, selected, start, position, table, block_size, scale, softcap):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _launch(q, k_cache, v_cache, selected, start, position, table, block_size, scale, softcap):
    from kernel_index.kernels.sparse.selected_decode import triton

    out = _allocate(q, k_cache, v_cache, selected, start, position, table, block_size, scale, softcap)
    q, selected, start, position = launch.dense((q, selected, start, position))
    return triton.decode(q, k_cache, v_cache, selected, start, position, table, block_size, scale, softcap, out)


# Captured graphs hold this name, which is older than ``selected_decode``.
_decode_op = ops.register(
    "moba_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor picks, Tensor start, Tensor position, "
    "Tensor? table, int block_size, float scale, float softcap) -> Tensor",
    _launch,
    _allocate,
)


def attend_blocks(
    q: Tensor,
    cache: CacheLayer,
    blocks: Tensor,
    start: Tensor,
    position: Tensor,
    block_size: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """One launch over a written cache, for kernels that have routed.

    Each block of a query occurs once in ``blocks`` [B, Lq, G, n], −1 for none; G is a multiple of K that divides H.
    Query [b, t] attends to their tokens ``start ≤ s ≤ position``.
    """
    caches, table = (cache["k_cache"], cache["v_cache"]), cache["block_table"]
    return _decode_op(q, *caches, blocks, start, position, table, block_size, float(scale), float(softcap))


def selected_decode_triton(call: SelectedDecodeCall) -> Tensor:
    write_new_tokens(call)
    position = query_positions(call.cache, call.q.shape[1])
    start = window_starts(position, call.window[0])
    blocks = distinct(call.indices).expand(-1, -1, call.cache["k_cache"].shape[2], -1)
    return attend_blocks(call.q, call.cache, blocks, start, position, call.block_size, call.scale, call.softcap)
