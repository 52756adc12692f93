"""Which blocks MoBA's queries attend to: the current one, and the best of the past by their mean keys."""

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.native import native_top_blocks, native_why_not
from kernel_index.routing.block_router.torch_op import fused_top_blocks, fused_why_not
from kernel_index.routing.legal_blocks import (
    LegalBlocks,
    TopBlocks,
    block_means,
    group_queries,
    legal_blocks,
    num_blocks,
    top_blocks,
)

SCORES_AT_ONCE = 1 << 22
"""Queries are taken in chunks of at most this many scores."""


def scored(q: Tensor, means: Tensor, groups: int) -> Tensor:
    """The score of each block for each group of heads, at least float32 [B, T, G, blocks].

    Args:
        q: [B, T, H, D].
        means: [B, blocks, K, D], at least float32.
        groups: G; K divides it, and it divides H.
    """
    return _scores(group_queries(q, groups), means)


def _scores(q_BTGD: Tensor, means_BNKD: Tensor) -> Tensor:
    """One product for each key head: the means are read where they lie."""
    queries, groups, kv_heads = q_BTGD.shape[1], q_BTGD.shape[2], means_BNKD.shape[2]
    each = groups // kv_heads
    q_BTKED = q_BTGD.unflatten(2, (kv_heads, each))
    means_BNKD = means_BNKD.to(q_BTGD.dtype)
    parts = [q_BTKED[:, :, h].flatten(1, 2) @ means_BNKD[:, :, h].transpose(1, 2) for h in range(kv_heads)]
    return torch.stack([part.unflatten(1, (queries, each)) for part in parts], 2).flatten(2, 3)


def route(q: Tensor, k: Tensor, block_size: int, topk: int, mask: MaskContract, groups: int) -> TopBlocks:
    """The blocks of every query, ``TopBlocks`` of [B, T, G, min(topk, blocks)]; without gradient.

    Chunk by chunk of queries, each with the blocks that some query of it may pick: those behind the last one's own,
    and in front of the first one's window, are not scored.
    """
    with torch.no_grad():
        sizes = mask.sizes(q.shape[0], q.shape[1], k.shape[1], q.device)
        legal = legal_blocks(mask, sizes, block_size)
        blocks = num_blocks(sizes.keys, block_size)
        topk = min(topk, max(1, blocks))
        means = block_means(k, block_size, mask)
        if fused_why_not(q, topk) is None:
            return fused_top_blocks(q, means, legal, topk, groups)
        if native_why_not(q, blocks, groups) is None:
            return native_top_blocks(q, means, legal, topk, groups)
        grouped = group_queries(q, groups)
        step = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * groups * blocks))
        if torch.compiler.is_compiling() or step >= sizes.queries:
            return top_blocks(_scores(grouped, means), legal, topk)
        parts = []
        for t in range(0, sizes.queries, step):
            end = min(t + step, sizes.queries)
            low, high = _visible(t + sizes.offset, end + sizes.offset, mask.window_bounds[0], block_size, blocks)
            scores = _scores(grouped[:, t:end], means[:, low:high])
            part = LegalBlocks(*(x[:, t:end] for x in legal))
            parts.append(top_blocks(scores, part, topk, first_block=low))
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def _visible(first: int, end: int, left: int | None, block_size: int, blocks: int) -> tuple[int, int]:
    """The blocks that queries at positions ``first ≤ p < end`` can see: at least one."""
    high = min(blocks, max(0, end - 1) // block_size + 1)
    low = 0 if left is None else max(0, first - left) // block_size
    return min(low, high - 1), high
