"""The two steps in PyTorch, one chunk of queries at a time: coarse groups first, then the children of the best."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.routing.forced_blocks import forced_blocks
from kernel_index.routing.hierarchical_block_expansion.contract import HierarchyCall
from kernel_index.routing.legal_blocks import TopBlocks, best_blocks
from kernel_index.routing.topk_keys import NOTHING, best_keys, index_of

SCORES_AT_ONCE = 1 << 22
"""Queries are taken in chunks of at most this many scores."""

ALL_CHILDREN = 64
"""While there are at most this many times more blocks than candidates, one matrix product that scores every block costs
less than fetching the candidates of each query: an element fetched takes as long as about that many multiplications."""


class Chunk(NamedTuple):
    """Some queries [B, T', K, D], the legal range of each [rows, T', 1] and its forced blocks [rows, T', 1, F]."""

    q: Tensor
    first: Tensor
    current: Tensor
    forced: Tensor


def select_chunked(call: HierarchyCall) -> TopBlocks:
    with torch.no_grad():
        queries, keys, legal = call.operands()
        forced = forced_blocks(legal, keys.shape[1], call.plan.forced)
        first, current = (x.to(torch.int64)[..., None] for x in legal)

        def select(at: slice) -> TopBlocks:
            chunk = Chunk(queries[:, at], first[:, at], current[:, at], forced[:, at])
            if call.plan.exhaustive:
                return exhaustive(chunk, keys, call.topk)
            return expanded(chunk, keys, call.plan.coarse_ratio, call.plan.coarse_topc, call.topk)

        step = max(1, SCORES_AT_ONCE // max(1, math.prod(keys.shape[:3])))
        if torch.compiler.is_compiling() or step >= queries.shape[1]:
            return select(slice(None))
        chunks = [select(slice(t, t + step)) for t in range(0, queries.shape[1], step)]
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*chunks, strict=True)))


def exhaustive(chunk: Chunk, block_keys: Tensor, topk: int) -> TopBlocks:
    """The best of all legal blocks."""
    scores = torch.einsum("btkd,bnkd->btkn", chunk.q, block_keys)
    block = torch.arange(block_keys.shape[1], device=scores.device)
    return _take(scores, block, chunk, topk)


def expanded(chunk: Chunk, block_keys: Tensor, ratio: int, topc: int, topk: int) -> TopBlocks:
    """The best of the legal children of the ``topc`` best groups."""
    blocks = block_keys.shape[1]
    groups = -(-blocks // ratio)
    padded = torch.nn.functional.pad(block_keys, (0, 0, 0, 0, 0, groups * ratio - blocks))
    by_group = padded.unflatten(1, (groups, ratio)).movedim(3, 2)  # [B, groups, K, ratio, D]
    if groups > ALL_CHILDREN * topc:
        coarse = torch.einsum("btkd,bmkd->btkm", chunk.q, by_group.mean(3))

        def children(at: Tensor) -> Tensor:
            return _fetched(chunk, by_group, at)
    else:
        every = torch.einsum("btkd,bnkd->btkn", chunk.q, padded).unflatten(3, (groups, ratio))
        coarse = every.mean(-1)  # the score of a mean is the mean of the scores

        def children(at: Tensor) -> Tensor:
            return every.gather(3, at[..., None].expand(*every.shape[:3], at.shape[3], ratio))

    opened, exists = _best_groups(chunk, _with_ends(coarse, children, ratio, chunk), ratio, topc)
    scores = children(opened)
    block = opened[..., None] * ratio + torch.arange(ratio, device=opened.device)
    block = torch.where(exists[..., None], block, -1)
    return _take(scores.flatten(3), block.flatten(3), chunk, topk)


def _fetched(chunk: Chunk, by_group: Tensor, at: Tensor) -> Tensor:
    """The scores of the children of groups ``at`` [rows, T', 1 or K, n], read for each query; one dimension more."""
    batch, _, heads, _, _ = by_group.shape
    at = at.expand(batch, -1, heads, -1)
    rows = torch.arange(batch, device=at.device)[:, None, None, None]
    head = torch.arange(heads, device=at.device)[:, None]
    return torch.einsum("btkd,btkcrd->btkcr", chunk.q, by_group[rows, at, head])


def _with_ends(coarse: Tensor, children: Callable[[Tensor], Tensor], ratio: int, chunk: Chunk) -> Tensor:
    """Scores of the groups, of which those at the two ends of a query's range count their legal children alone."""
    group = torch.arange(coarse.shape[-1], device=coarse.device)
    child = torch.arange(ratio, device=coarse.device)
    for end in (chunk.first // ratio, (chunk.current - 1).clamp(min=0) // ratio):
        block = end[..., None, None] * ratio + child
        legal = (block >= chunk.first[..., None, None]) & (block < chunk.current[..., None, None])
        mean = torch.where(legal, children(end[..., None]), 0.0).sum(-1) / legal.sum(-1).clamp(min=1)
        coarse = torch.where(group == end[..., None], mean, coarse)
    return coarse


def _best_groups(chunk: Chunk, scores: Tensor, ratio: int, topc: int) -> tuple[Tensor, Tensor]:
    """The ``topc`` best of the groups with a legal child, and which of them exist."""
    group = torch.arange(scores.shape[-1], device=scores.device)
    legal = (group >= (chunk.first // ratio)[..., None]) & (group * ratio < chunk.current[..., None])
    best = best_keys(scores, legal, group, topc)
    exists = best > NOTHING
    return torch.where(exists, index_of(best), 0), exists


def _take(scores: Tensor, block: Tensor, chunk: Chunk, topk: int) -> TopBlocks:
    """The forced blocks and the best legal ones of the columns; ``block`` names each column, −1 for none."""
    first, current = chunk.first[..., None], chunk.current[..., None]
    legal = (block >= first) & (block < current)
    for i in range(chunk.forced.shape[-1]):
        legal = legal & (block != chunk.forced[..., i : i + 1])
    keys = best_keys(scores, legal, block, min(topk, scores.shape[-1]))
    return best_blocks(keys, chunk.forced, topk)
