"""The registered op behind ``triton`` of ``moba_decode``: it reads the cache, which was written and routed before."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.moba_block_sparse.decoding import route
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.masks.doc_window_mask.contract import Window


def _allocate(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _launch(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap):
    from kernel_index.kernels.sparse.moba_block_sparse import triton

    out = _allocate(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap)
    q, picks, start, position = launch.dense((q, picks, start, position))
    return triton.decode(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap, out)


_decode_op = ops.register(
    "moba_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor picks, Tensor start, Tensor position, "
    "Tensor? table, int block_size, float scale, float softcap) -> Tensor",
    _launch,
    _allocate,
)


def decode_triton(
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
    routed = route(q, cache, k, v, block_size, topk, window, groups)
    picks = torch.where(routed.picks.valid, routed.picks.indices, -1)
    caches = cache["k_cache"], cache["v_cache"]
    where = routed.start, routed.position, cache["block_table"]
    return _decode_op(q, *caches, picks, *where, block_size, float(scale_of(q, scale)), float(softcap))
