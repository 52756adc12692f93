"""What the backends of ``moba_decode`` share: the write, the routing, and where the picked keys lie."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.slots import append
from kernel_index.masks.doc_window_mask.contract import Window
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.scores import block_scores
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks, num_blocks, top_blocks

PROMPT = 32
"""A step of more queries than this is a prompt's: then most keys are picked by several queries."""


class Routed(NamedTuple):
    """The picked blocks of a step [B, Lq, G, n], and the keys ``start ≤ s ≤ position`` of each query, int64 [B, Lq]."""

    picks: TopBlocks
    start: Tensor
    position: Tensor


def route(
    q: Tensor,
    cache: CacheLayer,
    k: Tensor | None,
    v: Tensor | None,
    block_size: int,
    topk: int,
    window: Window,
    groups: int,
) -> Routed:
    """Write the new keys and values, bring the means up to date, and pick each query's blocks."""
    lengths, table = cache["cache_seqlens"], cache["block_table"]
    with torch.no_grad():
        append(cache["k_cache"], cache["v_cache"], lengths, k, v, table)
        queries = q.shape[1]
        total = lengths.to(torch.int64)[:, None] + cache.new_tokens
        position = total - queries + torch.arange(queries, device=q.device)
        left = window[0]
        start = torch.zeros_like(position) if left is None else (position - left).clamp(min=0)
        some = position >= 0
        current = torch.where(some, position // block_size, -1)
        legal = LegalBlocks(torch.where(some, start // block_size, 0), current)
        blocks = num_blocks(max(cache.lengths_after, default=0), block_size)
        scores = block_scores(q, cache.block_means(block_size), groups)
        # The block that is still growing has no mean and needs none: it is picked as the query's own.
        scores = torch.nn.functional.pad(scores, (0, max(0, blocks - scores.shape[-1])))
        return Routed(top_blocks(scores, legal, min(topk, max(1, blocks))), start, position)


class Places(NamedTuple):
    """Rows of the cache as [tokens, K, D], int64 [B, Lq, G, m], and which of them the query may attend to.

    A place that it may not is the query's own, so that nothing is read that was never written.
    """

    rows: Tensor
    allowed: Tensor


def places(routed: Routed, cache: CacheLayer, block_size: int) -> Places:
    """Where the ``m = n · block_size`` keys of each query's picked blocks lie."""
    table, (outer, inner) = cache["block_table"], cache["k_cache"].shape[:2]
    picks = routed.picks
    # A block larger than what the cache holds is the only one, and ends there.
    width = min(block_size, max(cache.lengths_after, default=0))
    offset = torch.arange(width, device=picks.indices.device)
    token = (picks.indices[..., None].to(torch.int64) * block_size + offset).flatten(3)
    start, position = (x[:, :, None, None] for x in (routed.start, routed.position))
    allowed = (token >= start) & (token <= position) & picks.valid.repeat_interleave(width, 3)
    token = torch.where(allowed, token, position.clamp(min=0))
    if table is None:
        rows = torch.arange(outer, device=token.device).view(outer, 1, 1, 1) * inner + token
        return Places(rows, allowed)
    pages = table.to(torch.int64).gather(1, (token // inner).flatten(1)).view_as(token)
    return Places(pages.clamp(min=0) * inner + token % inner, allowed)


def attend_to(q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, softcap: float) -> Tensor:
    """Softmax of ``q·keysᵀ`` times the values, by the last two dimensions; where nothing is allowed, 0."""
    scores = q @ keys.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    empty = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
    return torch.softmax(scores, -1).masked_fill(empty, 0.0) @ values


def prompt(
    q: Tensor,
    cache: CacheLayer,
    routed: Routed,
    block_size: int,
    window: Window,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """Each row through the block-sparse core, over the keys that it holds."""
    outs = []
    for b, total in enumerate(cache.lengths_after):
        k, v = cache.prefix(b)
        picks = TopBlocks(*(x[b : b + 1] for x in routed.picks))
        mask = MaskContract(window=(window[0], 0), q_offset=total - q.shape[1])
        result = block_sparse_attention(
            q[b : b + 1], k, v, picks.indices, selected_valid=picks.valid, block_size=block_size, mask=mask,
            scale=scale, softcap=softcap,
        )  # fmt: skip
        outs.append(result.out)
    return torch.cat(outs)
