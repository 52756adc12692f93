"""The exhaustive router in PyTorch, one chunk of queries at a time."""

import torch

from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.block_router.scores import grouped_scores, means_and_legal
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks, group_queries, top_blocks

SCORES_AT_ONCE = 1 << 22
"""Queries are taken in chunks of at most this many scores."""


def route_chunked(call: RouterCall) -> TopBlocks:
    """Each chunk of queries is scored against the blocks that some query of it may select.

    Blocks after the current block of its last query, and blocks before the window of its first query, are not scored.
    """
    with torch.no_grad():
        sizes, blocks, topk = call.sizes, call.blocks, call.selected
        means, legal = means_and_legal(call)
        q_BTGD = group_queries(call.q, call.groups)
        step = max(1, SCORES_AT_ONCE // max(1, sizes.batch * call.groups * blocks))
        if torch.compiler.is_compiling() or step >= sizes.queries:
            return top_blocks(grouped_scores(q_BTGD, means), legal, topk)
        chunks = []
        for t in range(0, sizes.queries, step):
            end = min(t + step, sizes.queries)
            window = call.mask.window_bounds[0]
            low, high = _visible(t + sizes.one_offset, end + sizes.one_offset, window, call.block_size, blocks)
            scores = grouped_scores(q_BTGD[:, t:end], means[:, low:high])
            legal_here = LegalBlocks(*(x[:, t:end] for x in legal))
            chunks.append(top_blocks(scores, legal_here, topk, first_block=low))
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*chunks, strict=True)))


def _visible(first: int, end: int, left: int | None, block_size: int, blocks: int) -> tuple[int, int]:
    """The blocks that queries at positions ``first ≤ p < end`` can see: at least one."""
    high = min(blocks, max(0, end - 1) // block_size + 1)
    low = 0 if left is None else max(0, first - left) // block_size
    return min(low, high - 1), high
