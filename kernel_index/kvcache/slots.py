"""Where new keys and values go, and the one write that every backend shares."""

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """The first two indices into a cache of each new token, int64 [B, Ln]: row and position, or page and slot."""

    outer: Tensor
    inner: Tensor


def places(lengths: Tensor, new: int, page: int, table: Tensor | None) -> Places:
    """Token i of row b goes to position ``lengths[b] + i``, through the table when there is one."""
    position = lengths.to(torch.int64)[:, None] + torch.arange(new, device=lengths.device)
    if table is None:
        rows = torch.arange(lengths.shape[0], device=lengths.device)[:, None]
        return Places(rows.expand_as(position), position)
    return Places(table.to(torch.int64).gather(1, position // page), position % page)


def append(
    k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None, v: Tensor | None, table: Tensor | None
) -> None:
    """Write k and v [B, Ln, K, D] behind the cached tokens: one scatter for each, whatever the batch."""
    if k is None or v is None or k.shape[0] == 0 or k.shape[1] == 0:
        return
    at = places(lengths, k.shape[1], k_cache.shape[1], table)
    k_cache.index_put_(at, k.detach())
    v_cache.index_put_(at, v.detach())


def gathered(cache: Tensor, table: Tensor | None) -> Tensor:
    """The cache as [B, S, K, D] with S its capacity; entries of the table that name no page read page 0."""
    if table is None:
        return cache
    rows, slots = table.shape
    pages = cache.index_select(0, table.reshape(-1).to(torch.int64).clamp(0, cache.shape[0] - 1))
    return pages.reshape(rows, slots * cache.shape[1], *cache.shape[2:])
