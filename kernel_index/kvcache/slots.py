"""Where tokens are in a cache, contiguous or paged: the only page-table arithmetic, and the write that all share."""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """The first two indices into a cache of each token, int64: row and position, or page and offset in the page."""

    outer: Tensor
    inner: Tensor

    def flat(self, page: int) -> Tensor:
        """Indices into the cache seen as [slots, K, D]; ``page`` as in ``slots``."""
        return self.outer * page + self.inner


def slots(table: Tensor | None, token: Tensor, page: int, *, first_row: int = 0) -> Slots:
    """The slots of some tokens of each row.

    Args:
        table: [B, pages], the pages of each row in order; None for a contiguous cache.  An entry that names no page
            (−1) counts as page 0.
        token: int64 [B, …], positions in their rows, none negative.
        page: tokens of a page, or the capacity of a row of a contiguous cache.
        first_row: the row of a contiguous cache that ``token[0]`` belongs to.
    """
    if table is None:
        row = torch.arange(first_row, first_row + token.shape[0], device=token.device)
        return Slots(row.view(-1, *[1] * (token.ndim - 1)).expand_as(token), token)
    column = token // page
    pages = table.to(torch.int64).gather(1, column if column.ndim == 2 else column.flatten(1)).clamp_(min=0)
    return Slots(pages if column.ndim == 2 else pages.view_as(token), token % page)


def next_tokens(lengths: Tensor, count: int) -> Tensor:
    """The positions of ``count`` new tokens in each row, int64 [B, count]: the first is at ``lengths[b]``."""
    return lengths.to(torch.int64)[:, None] + torch.arange(count, device=lengths.device)


def append(
    k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None, v: Tensor | None, table: Tensor | None
) -> None:
    """Write k and v [B, Ln, K, D] after the cached tokens: one scatter for each, whatever the batch."""
    if k is None or v is None or k.shape[0] == 0 or k.shape[1] == 0:
        return
    at = slots(table, next_tokens(lengths, k.shape[1]), k_cache.shape[1])
    k_cache.index_put_(at, k.detach())
    v_cache.index_put_(at, v.detach())


def gathered(cache: Tensor, table: Tensor | None) -> Tensor:
    """The cache as [B, S, K, D] with S its capacity; entries of the table that name no page read page 0."""
    if table is None:
        return cache
    rows, columns = table.shape
    pages = cache.index_select(0, table.reshape(-1).to(torch.int64).clamp(0, cache.shape[0] - 1))
    return pages.reshape(rows, columns * cache.shape[1], *cache.shape[2:])


class PrefixReader:
    """Reads rows out of a paged cache, one after the other, through the same two buffers.

    Reusing them saves time: allocating and page-faulting new memory for every row costs more than the copy.
    """

    def __init__(self, k_cache: Tensor, v_cache: Tensor, table: Tensor, longest: int):
        self.caches, self.page = (k_cache, v_cache), k_cache.shape[1]
        self.table, self.ids = table.to(torch.int64), table.tolist()
        columns = -(-longest // self.page)
        self.buffers = [cache.new_empty(columns, *cache.shape[1:]) for cache in self.caches]

    def read(self, row: int, first: int, end: int) -> tuple[Tensor, ...]:
        """Keys and values [1, end − first, K, D] of tokens [first, end): views where the pages follow each other."""
        low, high = first // self.page, -(-end // self.page)
        ids = self.ids[row][low:high]
        in_order = bool(ids) and ids == list(range(ids[0], ids[0] + len(ids)))
        found = []
        for cache, buffer in zip(self.caches, self.buffers, strict=True):
            if in_order:
                pages = cache[ids[0] : ids[0] + len(ids)]
            else:
                pages = torch.index_select(cache, 0, self.table[row, low:high], out=buffer[: high - low])
            flat = pages.reshape(1, len(ids) * self.page, *cache.shape[2:])
            found.append(flat[:, first - low * self.page : end - low * self.page])
        return tuple(found)
