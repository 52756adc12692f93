"""The specification of ``moba_decode``: gather the picked keys of each query, and softmax attention over them."""

import torch
from torch import Tensor

from kernel_index.core.rules import wants_gradient
from kernel_index.kernels.sparse.moba_block_sparse.decoding import attend_to, places, route
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.slots import places as new_places
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.masks.doc_window_mask.contract import Window

ELEMENTS_AT_ONCE = 1 << 24
"""Queries are taken in chunks of at most this many gathered elements."""


def decode_reference(
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
    rows, allowed = places(routed, cache, block_size)
    caches = cache["k_cache"], cache["v_cache"]
    if k is not None and v is not None and wants_gradient(k, v):  # the same values once more, as part of the graph
        at = new_places(cache["cache_seqlens"], k.shape[1], caches[0].shape[1], cache["block_table"])
        caches = caches[0].index_put(at, k), caches[1].index_put(at, v)
    k_RKD, v_RKD = (x.flatten(0, 1) for x in caches)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BTGHD = (q.to(dtype) * scale_of(q, scale)).unflatten(2, (groups, q.shape[2] // groups))
    head = torch.arange(groups, device=q.device)[:, None] // (groups // k_RKD.shape[1])

    def attend(t: slice) -> Tensor:
        keys_BTGMD, values_BTGMD = (x[rows[:, t], head].to(dtype) for x in (k_RKD, v_RKD))
        return attend_to(q_BTGHD[:, t], keys_BTGMD, values_BTGMD, allowed[:, t, :, None], softcap)

    step = max(1, ELEMENTS_AT_ONCE // max(1, rows[:, :1].numel() * q.shape[3]))
    parts = [attend(slice(t, t + step)) for t in range(0, max(1, q.shape[1]), step)]
    return torch.cat(parts, 1).flatten(2, 3).to(q.dtype).contiguous()
