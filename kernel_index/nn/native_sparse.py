"""The branches of native sparse attention: compressed blocks, selected blocks and a sliding window.

A complete block is compressed to the mean of its keys and the mean of its values.  A query at position p attends to the
compressed blocks before its current one, ``p // block``: all of their tokens are in its past.  Where documents meet in
a block, its means are over the last of them, as only queries of that document can have the block in their past.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import kernel_index as ki


class Compressed(NamedTuple):
    """Means [B, N, K, D] of the N complete blocks, and the first key of the document of each, int32 [rows, N]."""

    keys: Tensor
    values: Tensor
    document: Tensor


class Branches(NamedTuple):
    """The three results, each [B, T, H, D]."""

    compressed: Tensor
    selected: Tensor
    window: Tensor

    def joined(self, gates_BTHN: Tensor) -> Tensor:
        """Their sum, each times its gate [B, T, H, 3]."""
        return sum(x * gates_BTHN[..., i : i + 1] for i, x in enumerate(self))  # type: ignore[return-value]


def gates_of_seeing(gates_BTHN: Tensor, mask: "ki.MaskContract", keys: int) -> Tensor:
    """The gates, and 0 for queries that see nothing: those of padding may be NaN, and their result is exactly 0."""
    sizes = mask.sizes(gates_BTHN.shape[0], gates_BTHN.shape[1], keys, gates_BTHN.device)
    start, end, _ = mask.row_bounds(sizes)
    return torch.where((start < end)[..., None, None], gates_BTHN, 0.0)


def check_mask(mask: "ki.MaskContract") -> None:
    """Raise for what is no window of whole documents."""
    left = mask.window[0]
    if left is not None and left >= 0:
        raise ValueError(f"mask must have no window: the layer has a branch for it, got {mask.window}")


def attend_to_branches(
    q: Tensor, k: Tensor, v: Tensor, mask: "ki.MaskContract", *, block: int, topk: int, window: int
) -> Branches:
    """The branches of queries [B, T, H, D], tokens of [B, S, K, D]: the last of them, or those from ``q_offset`` on.

    Of a tree, each path of it: ``ki.along_paths``.
    """
    check_mask(mask)
    if mask.is_tree:

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: "ki.MaskContract") -> Branches:
            return attend_to_branches(q, k, v, mask, block=block, topk=topk, window=window)

        return Branches(*ki.along_paths(attend, mask, (q,), (k, v)))
    (batch, queries), total = q.shape[:2], k.shape[1]
    first = first_position(mask, queries, total)
    start, end = mask.intervals(batch, queries, total, device=q.device)
    own = dataclasses.replace(mask, q_offset=None).intervals(batch, total, total, device=q.device)
    compressed = compress(k, v, torch.where(own.start < own.end, own.start, -1), block)
    position = torch.arange(first, first + queries, device=q.device)
    sees = (start < end) & (start // block < position // block)
    out, lse = attend_to_compressed(q, compressed, sees, block, first)
    found = ki.importance_route(q, compressed.keys, lse, block_size=block, topk=topk, mask=mask, kv_len=total)
    selected = ki.block_sparse_attention(
        q, k, v, found.indices, selected_valid=found.valid, block_size=block, mask=mask
    ).out
    return Branches(out, selected, ki.attention(q, k, v, dataclasses.replace(mask, window=(window - 1, 0))))


def first_position(mask: "ki.MaskContract", queries: int, total: int) -> int:
    """The place of query 0 among ``total`` keys."""
    first = total - queries if mask.q_offset is None else mask.q_offset
    if isinstance(first, Tensor) or not 0 <= first <= total - queries:
        what = "one number for each row" if isinstance(first, Tensor) else first
        raise ValueError(f"mask.q_offset must be one number from 0 to {total - queries}, got {what}")
    return first


def compress(k: Tensor, v: Tensor, low: Tensor, block: int) -> Compressed:
    """``low`` [rows, S]: the first key of the document of each key, −1 for padding, which has no influence."""
    blocks = k.shape[1] // block
    low = low[:, : blocks * block].unflatten(1, (blocks, block))
    kept = (low == low[:, :, -1:]) & (low >= 0)
    counts = kept.sum(2).clamp(min=1)[..., None, None]

    def means(x: Tensor) -> Tensor:
        wide = x[:, : blocks * block].to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (blocks, block))
        return (torch.where(kept[..., None, None], wide, 0.0).sum(2) / counts).to(x.dtype)

    return Compressed(means(k), means(v), low[:, :, -1])


def attend_to_compressed(
    q: Tensor, compressed: Compressed, sees: Tensor, block: int, first: int
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, D] and log-sum-exp [B, H, T] of queries from position ``first`` on.

    The tokens of a block see the same compressed blocks, so they are heads of one query: this query stands before the
    block that holds them.  ``sees`` [rows, T]: which queries have a compressed block at all; the others give 0 and −∞.
    """
    (batch, queries, heads, width), (blocks, kv_heads) = q.shape, compressed.keys.shape[1:3]
    if blocks == 0 or queries == 0:
        return q * 0.0, q.new_full(
            (batch, heads, queries), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)
        )
    lead, per = first % block, heads // kv_heads
    groups = -(-(lead + queries) // block)
    q = torch.where(sees[..., None, None], q, 0.0)
    q = pad(q, (0, 0, 0, 0, lead, groups * block - lead - queries)).view(batch, groups, block, kv_heads, per, width)
    q = q.transpose(2, 3).reshape(batch, groups, kv_heads * block * per, width)
    out, lse = _attend_by_rows(q, compressed, first // block - 1)
    out = out.view(batch, groups, kv_heads, block, per, out.shape[3]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    lse = lse.view(batch, kv_heads, block, per, groups).permute(0, 1, 3, 4, 2).reshape(batch, heads, groups * block)
    at = slice(lead, lead + queries)
    return torch.where(sees[..., None, None], out[:, at], 0.0), torch.where(sees[:, None], lse[:, :, at], -torch.inf)


MOST_HEADS_OF_ROWS = 65_535
"""Batch rows times heads of one call: what the grid of a GPU's kernel holds."""


def _attend_by_rows(q: Tensor, compressed: Compressed, offset: int) -> tuple[Tensor, Tensor]:
    """Attention to the compressed blocks, of so many batch rows at a time as one call may have."""
    rows, document = max(1, MOST_HEADS_OF_ROWS // q.shape[2]), compressed.document.expand(q.shape[0], -1)
    parts = zip(*(x.split(rows) for x in (q, compressed.keys, compressed.values, document)), strict=True)
    found = [ki.attention_with_lse(q, k, v, ki.MaskContract(doc_ids=i, q_offset=offset)) for q, k, v, i in parts]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def attend_to_cached_branches(
    q: Tensor, k: Tensor, v: Tensor, cache: "ki.CacheLayer", *, block: int, topk: int, window: int
) -> Branches:
    """A step's new tokens over a cache, which keeps the means of its complete blocks; without a gradient."""
    queries, kept, blocks = q.shape[1], [], []
    cache.write(k, v)
    keys, values = cache.block_means(block), cache.block_means(block, values=True)
    for b, total in enumerate(cache.lengths_after):
        one, whole = slice(b, b + 1), total // block
        document = torch.zeros(1, whole, dtype=torch.int32, device=q.device)
        means = Compressed(keys[one, :whole].to(q.dtype), values[one, :whole].to(q.dtype), document)
        sees = torch.arange(total - queries, total, device=q.device)[None] >= block
        out, lse = attend_to_compressed(q[one], means, sees, block, total - queries)
        mask = ki.MaskContract(q_offset=total - queries)
        found = ki.importance_route(q[one], means.keys, lse, block_size=block, topk=topk, mask=mask, kv_len=total)
        kept.append(out)
        blocks.append(pad(found.indices, (0, topk - found.indices.shape[-1]), value=-1))
    selected = ki.selected_decode(q, cache, torch.cat(blocks), block_size=block)
    nearest = ki.fa4_kvcache_decode(q, k=k, v=v, window_size=(window - 1, 0), **cache)
    return Branches(torch.cat(kept), selected, nearest)
