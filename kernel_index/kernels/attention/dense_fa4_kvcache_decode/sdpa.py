"""Decoding on the CPU with PyTorch's own kernel: each row attends to its own prefix, nothing beyond it is read."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import reach_of
from kernel_index.kvcache.slots import append
from kernel_index.masks.doc_window_mask.contract import Window

QUERIES_AT_ONCE = 256
"""More new tokens than this are taken in chunks, each with the keys that it may see: no mask grows with T · S."""


def decode_sdpa(
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
    new = 0 if k is None else k.shape[1]
    totals = [n + new for n in lengths.tolist()]
    reach = reach_of(causal, window)
    out = q.new_empty(q.shape)
    if table is None and len(set(totals)) == 1:
        _attend(out, q, k_cache[:, : totals[0]], v_cache[:, : totals[0]], reach)
        return out
    pages = None if table is None else _Pages(k_cache, v_cache, table, max(totals, default=0))
    for row, total in enumerate(totals):
        at = slice(row, row + 1)
        first = 0 if reach[0] is None else max(0, total - q.shape[1] - reach[0])  # what no query of the row sees
        if pages is None:
            keys, values = k_cache[at, first:total], v_cache[at, first:total]
        else:
            keys, values = pages.prefix(row, first, total)
        _attend(out[at], q[at], keys, values, reach)
    return out


class _Pages:
    """Reads rows out of a paged cache, one after the other through the same two buffers.

    Fresh memory for every row would cost more than the copy: the machine has to find and zero it page by page.
    """

    def __init__(self, k_cache: Tensor, v_cache: Tensor, table: Tensor, longest: int):
        self.caches, self.page = (k_cache, v_cache), k_cache.shape[1]
        self.table, self.ids = table.to(torch.int64), table.tolist()
        slots = -(-longest // self.page)
        self.buffers = [cache.new_empty(slots, *cache.shape[1:]) for cache in self.caches]

    def prefix(self, row: int, first: int, total: int) -> tuple[Tensor, ...]:
        """Keys and values [1, S, K, D] of tokens [first, total): views where the pages follow each other."""
        low, high = first // self.page, -(-total // self.page)
        ids = self.ids[row][low:high]
        in_order = bool(ids) and ids == list(range(ids[0], ids[0] + len(ids)))
        found = []
        for cache, buffer in zip(self.caches, self.buffers, strict=True):
            if in_order:
                pages = cache[ids[0] : ids[0] + len(ids)]
            else:
                pages = torch.index_select(cache, 0, self.table[row, low:high], out=buffer[: high - low])
            flat = pages.reshape(1, len(ids) * self.page, *cache.shape[2:])
            found.append(flat[:, first - low * self.page : total - low * self.page])
        return tuple(found)


def _attend(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, reach: Window) -> None:
    """Fill out [B, Lq, H, D]; keys and values [B, S, K, D] end with the key at which the last query stands."""
    queries, total = q.shape[1], keys.shape[1]
    left, right = reach
    for t in range(0, queries, QUERIES_AT_ONCE):
        chunk = slice(t, min(t + QUERIES_AT_ONCE, queries))
        position = total - queries + torch.arange(chunk.start, chunk.stop, device=q.device)
        low = 0 if left is None else max(0, total - queries + chunk.start - left)
        high = total if right is None else min(total, total - queries + chunk.stop + right)
        if high <= low:
            out[:, chunk] = 0
            continue
        if chunk.stop - chunk.start == 1:  # one query sees every key that is left
            out[:, chunk] = _call(q[:, chunk], keys[:, low:high], values[:, low:high], None)
            continue
        key = torch.arange(low, high, device=q.device)
        allowed = q.new_ones(position.shape[0], high - low, dtype=torch.bool)
        if left is not None:
            allowed &= key >= position[:, None] - left
        if right is not None:
            allowed &= key <= position[:, None] + right
        empty = ~allowed.any(1)
        result = _call(q[:, chunk], keys[:, low:high], values[:, low:high], allowed | empty[:, None])
        out[:, chunk] = result.masked_fill_(empty[:, None, None], 0.0) if bool(empty.any()) else result


def _call(q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """One call of the kernel.  The query heads of a key head join as queries, so that its keys are read once."""
    batch, queries, heads, width = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    q_BKXD = q.view(batch, queries, kv_heads, group, width).permute(0, 2, 3, 1, 4)
    q_BKXD = q_BKXD.reshape(batch, kv_heads, group * queries, width)
    mask = None if allowed is None or bool(allowed.all()) else allowed.repeat(group, 1)
    keys, values = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (keys, values))
    out = scaled_dot_product_attention(q_BKXD, keys, values, attn_mask=mask)
    return out.view(batch, kv_heads, group, queries, width).permute(0, 3, 1, 2, 4).reshape(q.shape)
