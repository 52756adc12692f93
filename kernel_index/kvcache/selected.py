"""Selected tokens of a cache: where they are, and attention over them by the plain formula."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.rules import wants_gradient
from kernel_index.core.triton.launch import next_power_of_2
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.slots import next_tokens, slots

ELEMENTS_AT_ONCE = 1 << 24
"""Queries are taken in chunks of at most this many gathered elements."""


def query_positions(cache: CacheLayer, queries: int) -> Tensor:
    """Positions of the last ``queries`` tokens of each row, int64 [B, Lq]; negative where the row has fewer tokens."""
    lengths, new = cache["cache_seqlens"], cache.new_tokens
    return lengths.to(torch.int64)[:, None] + torch.arange(new - queries, new, device=lengths.device)


def window_starts(position: Tensor, left: int | None) -> Tensor:
    """The first token that each query's window holds, never negative; ``left`` None is unlimited."""
    return torch.zeros_like(position) if left is None else (position - left).clamp(min=0)


class Visible(NamedTuple):
    """Which tokens the Lq queries of a row see: the last one is at ``lengths + new − 1``, and none sees a later token.

    ``lengths`` [B] and ``table`` [B, pages] or None are the cache's, on the device; ``left`` −1 is unlimited.
    """

    lengths: Tensor
    table: Tensor | None
    new: int
    left: int

    @property
    def widest(self) -> int:
        """Columns that the table can ever have: what a cache hands out is a view of one as wide as rows may grow."""
        return 0 if self.table is None else max(self.table.shape[1], self.table.stride(0))

    @property
    def columns(self) -> int:
        """Columns that memory is taken for, since a captured step serves rows that grow."""
        return 0 if self.table is None else min(self.widest, max(256, 4 * next_power_of_2(self.table.shape[1])))


class SelectedTokens(NamedTuple):
    """Indices into the cache seen as [slots, K, D], int64 [B, Lq, G, m], and whether the query may attend to each.

    Where it may not, the index is that of a token that the query does attend to: excluded tokens are never read, so NaN
    there has no influence.  A query without tokens reads the first slot of its row; its result must be set to 0.
    """

    index: Tensor
    allowed: Tensor


def selected_tokens(
    blocks: Tensor, block_size: int, position: Tensor, left: int | None, cache: CacheLayer
) -> SelectedTokens:
    """The ``m = n · block_size`` tokens of each query's selected blocks [B, Lq, G, n], −1 for none.

    A query at ``position`` [B, Lq] attends to none after it, and to ``left`` before it; None is unlimited.
    """
    page = cache["k_cache"].shape[1]
    token_BTGM = blocks.to(torch.int64)
    if block_size > 1:
        width = min(block_size, max(cache.lengths_after, default=0))  # a larger block ends with the longest row
        offset = torch.arange(width, device=blocks.device)
        token_BTGM = (token_BTGM[..., None] * block_size + offset).flatten(3)
    position = position.view(*position.shape, 1, 1)
    allowed = (token_BTGM >= 0) & (token_BTGM <= position)  # those of block −1 are negative
    if left is not None:
        allowed &= token_BTGM >= position - left
    if token_BTGM.shape[3]:
        last = torch.where(allowed, token_BTGM, -1).amax(3, keepdim=True).clamp_(min=0)
        token_BTGM = torch.where(allowed, token_BTGM, last)
    return SelectedTokens(slots(cache["block_table"], token_BTGM, page).flat(page), allowed)


def attend_selected(
    q: Tensor,
    cache: CacheLayer,
    k: Tensor | None,
    v: Tensor | None,
    tokens: SelectedTokens,
    scale: float,
    softcap: float,
    sink: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the selected tokens, at least float32 within; k and v are those already written.

    Differentiable in q, k and v [B, Lq, …] and sink [H]; the rest of the cache is a constant.
    """
    caches = cache["k_cache"], cache["v_cache"]
    groups, page = tokens.index.shape[2], caches[0].shape[1]
    if k is not None and v is not None and wants_gradient(k, v):
        new = slots(cache["block_table"], next_tokens(cache["cache_seqlens"], k.shape[1]), page)
        caches = caches[0].index_put(new, k), caches[1].index_put(new, v)  # the same values, with a graph
    k_SKD, v_SKD = (x.flatten(0, 1) for x in caches)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BTGHD = (q.to(dtype) * scale).unflatten(2, (groups, q.shape[2] // groups))
    head = torch.arange(groups, device=q.device)[:, None] // (groups // k_SKD.shape[1])
    sinks = None if sink is None else sink.to(dtype).view(groups, -1, 1)

    def attend(t: slice) -> Tensor:
        keys_BTGMD, values_BTGMD = (x[tokens.index[:, t], head].to(dtype) for x in (k_SKD, v_SKD))
        allowed = tokens.allowed[:, t, :, None]
        return attend_gathered(q_BTGHD[:, t], keys_BTGMD, values_BTGMD, allowed, softcap, sinks)

    chunk = max(1, ELEMENTS_AT_ONCE // max(1, tokens.index[:, :1].numel() * q.shape[3]))
    outs = [attend(slice(t, t + chunk)) for t in range(0, max(1, q.shape[1]), chunk)]
    return torch.cat(outs, 1).flatten(2, 3).to(q.dtype).contiguous()


def attend_gathered(
    q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, softcap: float, sink: Tensor | None = None
) -> Tensor:
    """Softmax of ``q·keysᵀ`` times the values, by the last two dimensions; 0 where nothing is allowed.

    ``sink`` [.., rows, 1]: one logit more in each row's denominator.
    """
    empty = ~allowed.any(-1, keepdim=True)
    keys, values = (x.masked_fill(empty, 0.0) for x in (keys, values))  # of a token that the query may not see
    scores = q @ keys.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
    if sink is None:
        return torch.softmax(scores, -1) @ values
    return torch.softmax(torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1), -1)[..., :-1] @ values
