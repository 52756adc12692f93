"""Decoding on the CPU with PyTorch's own kernel: each row attends to its own prefix, and only that is read."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_index.core.excluded import Sight, guarded, sight_of_intervals
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall
from kernel_index.kvcache.slots import PrefixReader, append
from kernel_index.masks.doc_window_mask.contract import Window

QUERIES_AT_ONCE = 256
"""More new tokens than this are taken in chunks, each with the keys inside its window: no mask grows with T · S."""


def decode_sdpa(call: DecodeCall) -> Tensor:
    q, k_cache, v_cache, table = call.q, call.k_cache, call.v_cache, call.block_table
    append(k_cache, v_cache, call.cache_seqlens, call.k, call.v, table)
    totals = [n + call.new_tokens for n in call.cache_seqlens.tolist()]
    window_bounds, scale = call.window_bounds, call.scale
    left = window_bounds[0]
    out = q.new_empty(q.shape)
    if table is None and len(set(totals)) == 1:
        _attend(out, q, k_cache[:, : totals[0]], v_cache[:, : totals[0]], window_bounds, scale)
        return out
    reader = None if table is None else PrefixReader(k_cache, v_cache, table, max(totals, default=0))
    for row, total in enumerate(totals):
        one = slice(row, row + 1)
        first = 0 if left is None else max(0, total - q.shape[1] - left)  # before every query's window
        if reader is None:
            keys, values = k_cache[one, first:total], v_cache[one, first:total]
        else:
            keys, values = reader.read(row, first, total)
        _attend(out[one], q[one], keys, values, window_bounds, scale)
    return out


def _attend(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, window_bounds: Window, scale: float) -> None:
    """Fill out [B, Lq, H, D]; keys and values [B, S, K, D] end with the key of the last query's own token."""
    queries, total = q.shape[1], keys.shape[1]
    left, right = window_bounds
    for t in range(0, queries, QUERIES_AT_ONCE):
        chunk = slice(t, min(t + QUERIES_AT_ONCE, queries))
        position = total - queries + torch.arange(chunk.start, chunk.stop, device=q.device)
        low = 0 if left is None else max(0, total - queries + chunk.start - left)
        high = total if right is None else min(total, total - queries + chunk.stop + right)
        if high <= low:
            out[:, chunk] = 0
            continue
        if chunk.stop - chunk.start == 1:  # one query sees every key of its interval
            out[:, chunk] = _call(q[:, chunk], keys[:, low:high], values[:, low:high], None, scale)
            continue
        start = torch.zeros_like(position) if left is None else position - left - low
        end = torch.full_like(position, high - low) if right is None else position + right + 1 - low
        start, end = (x.clamp(0, high - low)[None] for x in (start, end))
        out[:, chunk] = _masked(_Chunk(q[:, chunk], keys[:, low:high], values[:, low:high], start, end, scale))


class _Chunk(NamedTuple):
    """Queries of which each sees its own keys ``start ≤ s < end``, int64 [1, Lq]."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    end: Tensor
    scale: float

    @property
    def excludes(self) -> bool:
        return True

    def sight(self) -> Sight:
        return sight_of_intervals(self.start, self.end)


@guarded
def _masked(chunk: _Chunk) -> Tensor:
    key, start, end = torch.arange(chunk.k.shape[1], device=chunk.q.device), chunk.start[0], chunk.end[0]
    allowed = (key >= start[:, None]) & (key < end[:, None])
    empty = start >= end
    result = _call(chunk.q, chunk.k, chunk.v, allowed | empty[:, None], chunk.scale)
    return result.masked_fill_(empty[:, None, None], 0.0) if bool(empty.any()) else result


def _call(q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """One call of the kernel.  The query heads of a KV head become queries, so that its keys are read once."""
    batch, queries, heads, width = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    q_BKXD = q.view(batch, queries, kv_heads, group, width).permute(0, 2, 3, 1, 4)
    q_BKXD = q_BKXD.reshape(batch, kv_heads, group * queries, width)
    mask = None if allowed is None or bool(allowed.all()) else allowed.repeat(group, 1)
    keys, values = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (keys, values))
    out = scaled_dot_product_attention(q_BKXD, keys, values, attn_mask=mask, scale=scale)
    return out.view(batch, kv_heads, group, queries, width).permute(0, 3, 1, 2, 4).reshape(q.shape)
