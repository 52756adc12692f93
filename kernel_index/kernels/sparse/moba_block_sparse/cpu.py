"""Decoding on the CPU: the picked keys of a key head are copied into memory that stays in cache, and attended to there.

A prompt's many queries go to the block-sparse core instead, row by row, which copies nothing for each query.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_index.kernels.sparse.moba_block_sparse.decoding import PROMPT, Routed, attend_to, places, prompt, route
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.masks.doc_window_mask.contract import Window

ELEMENTS_AT_ONCE = 1 << 18
"""Of keys, and of values, that are copied at a time: 1 MiB of float32."""


def decode_cpu(
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
    if q.shape[1] > PROMPT:
        return prompt(q, cache, routed, block_size, window, scale, softcap)
    out = q.new_empty(q.shape)
    if out.numel():
        _step(out, q, cache, routed, block_size, groups, scale_of(q, scale), softcap)
    return out


def _step(
    out: Tensor,
    q: Tensor,
    cache: CacheLayer,
    routed: Routed,
    block_size: int,
    groups: int,
    scale: float,
    softcap: float,
) -> None:
    (batch, queries, heads, width), kv_heads = q.shape, cache["k_cache"].shape[2]
    rows, allowed = places(routed, cache, block_size)
    flat_k, flat_v = (cache[name].view(-1, width) for name in ("k_cache", "v_cache"))
    # [B, K, Lq · G/K, …]: everything of one key head together.
    rows, allowed = (x.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3) for x in (rows, allowed))
    rows = rows * kv_heads + torch.arange(kv_heads, device=rows.device)[:, None, None]
    split = (kv_heads, groups // kv_heads, heads // groups)
    q_BKXHD = q.unflatten(2, split).transpose(1, 2).flatten(2, 3)
    out_BKTGHD = out.view(batch, queries, *split, width).transpose(1, 2)
    bags, keys = rows.shape[2:]
    step = max(1, ELEMENTS_AT_ONCE // (keys * width))
    scratch = cache.scratch(2 * min(step, bags) * keys * width).view(2, -1, width)
    for b in range(batch):
        for h in range(kv_heads):
            parts = []
            for x in range(0, bags, step):
                at = rows[b, h, x : x + step].flatten()
                k_MD, v_MD = (
                    torch.index_select(source, 0, at, out=into[: at.shape[0]])
                    for source, into in zip((flat_k, flat_v), scratch, strict=True)
                )
                some = allowed[b, h, x : x + step, None]
                parts.append(_attend(q_BKXHD[b, h, x : x + step], k_MD, v_MD, some, scale, softcap))
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            out_BKTGHD[b, h] = joined.view(out_BKTGHD.shape[2:])


def _attend(q: Tensor, k_MD: Tensor, v_MD: Tensor, allowed: Tensor, scale: float, softcap: float) -> Tensor:
    """q [X, H', D], the keys of all X one after the other, allowed [X, 1, m]."""
    keys, values = (x.view(q.shape[0], -1, q.shape[-1]) for x in (k_MD, v_MD))
    if softcap:
        wide = torch.promote_types(q.dtype, torch.float32)
        return attend_to(q.to(wide) * scale, keys.to(wide), values.to(wide), allowed, softcap)
    return scaled_dot_product_attention(
        q[:, None], keys[:, None], values[:, None], attn_mask=allowed[:, None], scale=scale
    )
