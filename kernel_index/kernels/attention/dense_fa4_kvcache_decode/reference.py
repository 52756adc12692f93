"""The specification: append, then softmax attention over what the cache holds, in at least float32."""

import torch
from torch import Tensor

from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import reach_of
from kernel_index.kvcache.slots import append, gathered, places
from kernel_index.masks.doc_window_mask.contract import Window

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores: 256 MiB of float32."""


def bounds(total: Tensor, queries: int, reach: Window) -> tuple[Tensor, Tensor]:
    """The keys ``start ≤ s < end`` of each query, int64 [B, Lq]; the last query stands at the last key."""
    left, right = reach
    position = total[:, None] - queries + torch.arange(queries, device=total.device)
    end = total[:, None].expand_as(position) if right is None else torch.minimum(position + right + 1, total[:, None])
    start = torch.zeros_like(position) if left is None else position - left
    return start.clamp(min=0), end.clamp(min=0)


def decode_reference(
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
    append(k_cache, v_cache, lengths, k, v, table)
    batch, queries, heads, width = q.shape
    kv_heads, new = k_cache.shape[2], 0 if k is None else k.shape[1]
    keys, values = gathered(k_cache, table), gathered(v_cache, table)
    if torch.is_grad_enabled() and k is not None and v is not None and (k.requires_grad or v.requires_grad):
        at = places(lengths, new, k_cache.shape[1], None)  # the same values once more, as part of the graph
        keys, values = keys.index_put(at, k), values.index_put(at, v)
    total = lengths.to(torch.int64) + new
    start, end = bounds(total, queries, reach_of(causal, window))
    key = torch.arange(keys.shape[1], device=q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    k_BKSD = keys.to(dtype).transpose(1, 2)
    # What lies behind the last token is nobody's: a weight of 0 times a NaN would still be NaN.
    v_BKSD = values.masked_fill((key >= total[:, None])[:, :, None, None], 0.0).to(dtype).transpose(1, 2)
    q_BKGTD = (q.to(dtype) * width**-0.5).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)

    def attend(chunk: slice) -> Tensor:
        allowed = (key >= start[:, chunk, None]) & (key < end[:, chunk, None])
        scores = torch.einsum("bkgtd,bksd->bkgts", q_BKGTD[:, :, :, chunk], k_BKSD)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        empty = ~allowed.any(-1)[:, None, None, :, None]
        scores = scores.masked_fill(~allowed[:, None, None], -torch.inf).masked_fill(empty, 0.0)
        return torch.einsum("bkgts,bksd->bkgtd", torch.softmax(scores, -1).masked_fill(empty, 0.0), v_BKSD)

    step = queries
    if not torch.compiler.is_compiling() and batch * heads * queries * key.numel() > SCORES_AT_ONCE:
        step = max(1, SCORES_AT_ONCE // (batch * heads * key.numel()))
    parts = [attend(slice(t, t + step)) for t in range(0, queries, step)] if queries else [attend(slice(None))]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype).contiguous()
