"""Phase 1: which blocks each query's group of heads takes.  No gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.masks.causal_windowing_predicate.api import WindowingPlan, causal_windowing_plan
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.native import native_top_blocks, native_why_not
from kernel_index.routing.block_router.torch_op import fused_top_blocks, fused_why_not
from kernel_index.routing.hierarchical_block_expansion.api import hierarchical_block_select
from kernel_index.routing.legal_blocks import (
    LegalBlocks,
    TopBlocks,
    block_means,
    group_queries,
    legal_blocks,
    num_blocks,
    top_blocks,
)

QUERIES = 1024
"""Queries that are scored together."""

TILE_BLOCKS = 16
"""Blocks of a tile, the unit in which the future and what lies in front of the window are skipped."""


class Chunk(NamedTuple):
    """Some queries, and the blocks that their plan leaves to be scored."""

    queries: slice
    blocks: slice
    plan: WindowingPlan


def chunks_of(mask: MaskContract, sizes: Sizes, block_size: int) -> tuple[Chunk, ...]:
    """The scoring loop: chunks of queries, each with the tiles of blocks that the causal windowing plan keeps."""
    blocks = num_blocks(sizes.keys, block_size)
    found = []
    for begin in range(0, sizes.queries, QUERIES):
        end = min(begin + QUERIES, sizes.queries)
        first = max(0, begin + sizes.offset)  # queries in front of the first key attend to nothing
        plan = causal_windowing_plan(
            num_blocks=blocks,
            tile_size=TILE_BLOCKS,
            block_stride=block_size,
            q_chunk_start=first,
            q_chunk_size=max(1, end + sizes.offset - first),
            left_window=mask.window_bounds[0],
        )
        tiles = plan.active_tiles
        low, high = (tiles[0], tiles[-1] + 1) if tiles else (0, 0)
        found.append(Chunk(slice(begin, end), slice(low * TILE_BLOCKS, min(high * TILE_BLOCKS, blocks)), plan))
    return tuple(found)


def pick_blocks(q: Tensor, k: Tensor, config: ClusteredSparseConfig, mask: MaskContract, sizes: Sizes) -> TopBlocks:
    """The picks of every query, ``TopBlocks`` of [B, T, K, min(topk, blocks)]."""
    with torch.no_grad():
        means = block_means(k, config.block_size, mask)
        topk = min(config.topk, max(1, num_blocks(sizes.keys, config.block_size)))
        if config.hierarchy is not None and sizes.queries * sizes.keys > 0:
            ratio, topc = config.hierarchy
            picked = hierarchical_block_select(
                q,
                means,
                coarse_ratio=ratio,
                coarse_topc=topc,
                final_topk=topk,
                mask=mask,
                block_size=config.block_size,
                kv_len=sizes.keys,
            )
            return TopBlocks(picked.indices, picked.valid)
        legal = legal_blocks(mask, sizes, config.block_size)
        if config.fused_scoring and fused_why_not(q, config.topk) is None:
            return fused_top_blocks(q, means, legal, topk, k.shape[2])
        if config.fused_scoring and native_why_not(q, means.shape[1], k.shape[2]) is None:
            return native_top_blocks(q, means, legal, topk, k.shape[2])
        queries, keys = group_queries(q, k.shape[2]).transpose(1, 2), means.permute(0, 2, 3, 1)
        if torch.compiler.is_compiling() or sizes.queries == 0:  # a trace serves every length: no loop over chunks
            return top_blocks((queries @ keys).transpose(1, 2), legal, topk)
        chunks = chunks_of(mask, sizes, config.block_size)
        if not config.fused_scoring:
            return top_blocks(_all_scores(queries, keys, chunks), legal, topk)
        parts = []
        for at, blocks, _ in chunks:
            scores = (queries[:, :, at] @ keys[..., blocks]).transpose(1, 2)
            parts.append(top_blocks(scores, LegalBlocks(*(x[:, at] for x in legal)), topk, first_block=blocks.start))
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def _all_scores(queries: Tensor, keys: Tensor, chunks: tuple[Chunk, ...]) -> Tensor:
    """Scores [B, T, K, blocks], written where the plans say; what they skip stays −∞."""
    scores = torch.full((*queries.shape[:3], keys.shape[-1]), -torch.inf, dtype=queries.dtype, device=queries.device)
    for at, blocks, _ in chunks:
        scores[:, :, at, blocks] = queries[:, :, at] @ keys[..., blocks]
    return scores.transpose(1, 2)
