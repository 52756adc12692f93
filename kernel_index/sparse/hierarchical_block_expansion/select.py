"""Coarse groups first, then the children of the best: the two steps, chunk by chunk of queries."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.sparse.ordered import FORCED, NOTHING, pack, place_of, rank_of
from kernel_index.sparse.routing import LegalBlocks, TopBlocks

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


def forced_blocks(legal: LegalBlocks, blocks: int, names: tuple[str, ...]) -> Tensor:
    """int64 [rows, T, 1, F]; −1 where the block does not exist, is not legal, or is forced already."""
    first, current = (x.to(torch.int64) for x in legal)
    here = torch.where(current < blocks, current, -1)
    found = {
        "current": here,
        "sink": torch.where(first < current, first, -1),
        "local": torch.where((current - 1 >= first) & (current > 0), current - 1, -1),
    }
    columns: list[Tensor] = []
    for name in names:
        column = found[name]
        for earlier in columns:
            column = torch.where(column == earlier, -1, column)
        columns.append(column)
    if not columns:
        return first.new_empty((*first.shape, 1, 0))
    return torch.stack(columns, -1)[:, :, None]


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
    if groups > ALL_CHILDREN * topc:
        by_group = padded.unflatten(1, (groups, ratio)).movedim(3, 2)  # [B, groups, K, ratio, D]
        picked, taken = _best_groups(chunk, _group_scores(chunk, by_group, ratio), ratio, topc)
        scores = _children(chunk, by_group, picked)
    else:
        every = torch.einsum("btkd,bnkd->btkn", chunk.q, padded).unflatten(3, (groups, ratio))
        block = torch.arange(groups * ratio, device=every.device).view(groups, ratio)
        picked, taken = _best_groups(chunk, _legal_mean(every, block, chunk), ratio, topc)
        scores = every.gather(3, picked[..., None].expand(*picked.shape, ratio))
    block = picked[..., None] * ratio + torch.arange(ratio, device=picked.device)
    block = torch.where(taken[..., None], block, -1)
    return _take(scores.flatten(3), block.flatten(3), chunk, topk)


def _children(chunk: Chunk, by_group: Tensor, picked: Tensor) -> Tensor:
    """The scores of the children of [rows, T', 1 or K, n] groups, fetched for each query: [B, T', K, n, ratio]."""
    batch, _, heads, _, _ = by_group.shape
    picked = picked.expand(batch, -1, heads, -1)
    rows = torch.arange(batch, device=picked.device)[:, None, None, None]
    head = torch.arange(heads, device=picked.device)[:, None]
    return torch.einsum("btkd,btkcrd->btkcr", chunk.q, by_group[rows, picked, head])


def _group_scores(chunk: Chunk, by_group: Tensor, ratio: int) -> Tensor:
    """[B, T', K, groups]; the two groups at the ends of a query's range from their legal children alone."""
    scores = torch.einsum("btkd,bmkd->btkm", chunk.q, by_group.mean(3))
    group = torch.arange(by_group.shape[1], device=scores.device)
    for end in (chunk.first // ratio, (chunk.current - 1).clamp(min=0) // ratio):
        end = end[..., None]
        block = end[..., None] * ratio + torch.arange(ratio, device=scores.device)
        own = _legal_mean(_children(chunk, by_group, end), block, chunk)
        scores = torch.where(group == end, own, scores)
    return scores


def _legal_mean(scores: Tensor, block: Tensor, chunk: Chunk) -> Tensor:
    """The score of a mean is the mean of the scores; what is not legal for a query is not looked at."""
    legal = (block >= chunk.first[..., None, None]) & (block < chunk.current[..., None, None])
    return torch.where(legal, scores, 0.0).sum(-1) / legal.sum(-1).clamp(min=1)


def _best_groups(chunk: Chunk, scores: Tensor, ratio: int, topc: int) -> tuple[Tensor, Tensor]:
    """The ``topc`` best of the groups with a legal child, and which of them exist."""
    group = torch.arange(scores.shape[-1], device=scores.device)
    legal = (group >= (chunk.first // ratio)[..., None]) & (group * ratio < chunk.current[..., None])
    key = torch.where(legal, pack(rank_of(scores), group), NOTHING)
    best = torch.topk(key, topc, dim=-1, sorted=False).values
    taken = best > NOTHING
    return torch.where(taken, place_of(best), 0), taken


def _take(scores: Tensor, block: Tensor, chunk: Chunk, topk: int) -> TopBlocks:
    """The forced blocks and the best legal ones of the columns; ``block`` names each column, −1 for none."""
    first, current = chunk.first[..., None], chunk.current[..., None]
    legal = (block >= first) & (block < current)
    for i in range(chunk.forced.shape[-1]):
        legal = legal & (block != chunk.forced[..., i : i + 1])
    key = torch.where(legal, pack(rank_of(scores), block), NOTHING)
    forced = chunk.forced.expand(*key.shape[:-1], -1)
    key = torch.cat([key, torch.where(forced >= 0, pack(torch.full_like(forced, FORCED), forced), NOTHING)], -1)
    best = torch.topk(key, min(topk, key.shape[-1]), dim=-1, sorted=False).values
    behind = torch.iinfo(torch.int32).max
    places = torch.where(best > NOTHING, place_of(best), behind).to(torch.int32).sort(-1).values
    places = torch.nn.functional.pad(places, (0, topk - places.shape[-1]), value=behind)
    valid = places < behind
    return TopBlocks(torch.where(valid, places, -1), valid)
