"""A KV cache in pages: sequences of any length share one pool, and share pages until one of them writes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.kvcache.cache import KVCache


class OutOfPages(ValueError):
    """The pool has too few free pages for a step; nothing was changed, and freeing a sequence makes room.

    >>> import kernel_index as ki
    >>> cache = ki.PagedKVCache(1, 2, 4, 1, 8)
    >>> try:
    ...     cache.begin([cache.allocate()], 9)
    ... except ki.OutOfPages as error:
    ...     print(error)
    tokens must need at most 2 free pages, got 3
    """


@dataclass
class _Sequence:
    length: int = 0
    pages: list[int] = field(default_factory=list)


class PagedKVCache(KVCache):
    """A cache of pages: a sequence takes pages when it grows and returns them when it is freed.

    A page has a reference count.  ``share`` gives a new sequence the pages of another; a step that would write to a
    page with several owners copies it first, so that each writer has its own.  A page is zeroed before a sequence gets
    it: what another sequence left there, even NaN, never influences an output.

    Args:
        layers, pages, page_size, kv_heads, head_dim: sizes of ``k`` and ``v`` [layers, pages, page, K, D].
        dtype: of keys and values.
        device: of keys and values.

    >>> import torch, kernel_index as ki
    >>> cache = ki.PagedKVCache(1, 8, 4, 1, 2)
    >>> x = torch.ones(1, 6, 1, 2)
    >>> first = cache.allocate()
    >>> cache.begin([first], 6)
    >>> out = ki.fa4_kvcache_decode(x, k=x, v=x, **cache.layer(0))
    >>> cache.advance()
    >>> second = cache.share(first)
    >>> cache.length(second), cache.free_pages
    (6, 6)
    >>> cache.begin([first, second], 1)      # both write after token 6: one of them gets a page of its own
    >>> cache.free_pages, cache.counters.copied
    (5, 1)
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        names = "layers pages page_size kv_heads head_dim"
        super().__init__((layers, pages, page_size, kv_heads, head_dim), dtype, device, names)
        self._free = list(range(pages - 1, -1, -1))  # taken from the end: lowest page first
        self._owners = [0] * pages
        self._dirty = [False] * pages
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._stepping: list[int] = []

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def length(self, sequence: int) -> int:
        """Cached tokens of a sequence."""
        return self._find(sequence).length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The pages of a sequence, in order."""
        return tuple(self._find(sequence).pages)

    def owners(self, page: int) -> int:
        """The number of sequences that hold a page."""
        checks.is_int("page", page, minimum=0)
        return self._owners[page]

    def allocate(self) -> int:
        """A new, empty sequence; it takes pages when it grows."""
        self._next += 1
        self._sequences[self._next - 1] = _Sequence()
        return self._next - 1

    def share(self, sequence: int) -> int:
        """A new sequence with the same tokens in the same pages, until one of the two writes."""
        source = self._find(sequence)
        used = source.pages[: -(-source.length // self.page_size)]
        copy = self.allocate()
        self._sequences[copy] = _Sequence(source.length, list(used))
        for page in used:
            self._owners[page] += 1
        for means in self._means.values():
            means.share(sequence, copy)
        return copy

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages without another owner return to the pool.  Abandons a step that it is part of."""
        for page in self._find(sequence).pages:
            self._release(page)
        del self._sequences[sequence]
        for means in self._means.values():
            means.forget(sequence)
        if sequence in self._stepping:
            self._step, self._stepping = None, []

    def begin(self, sequences: Sequence[int], tokens: int) -> None:
        """Open a step of so many new tokens in each sequence, and give each the pages for them; 0 only reads.

        Raises ``OutOfPages``, with nothing changed, where the pool has too few.
        """
        checks.is_int("tokens", tokens, minimum=0)
        chosen = list(sequences)
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"sequences must be different from each other, got {chosen}")
        rows = [self._find(s) for s in chosen]
        shared, missing = self._plan(rows, tokens)
        if len(shared) + missing > self.free_pages:
            raise OutOfPages(f"tokens must need at most {self.free_pages} free pages, got {len(shared) + missing}")
        for row, column in shared:
            self._copy(row, column)
        fresh: list[int] = []
        for row in rows:
            while len(row.pages) * self.page_size < row.length + tokens:
                row.pages.append(self._take())
                fresh.append(row.pages[-1])
        self._zero(fresh)
        self._stepping = chosen
        self._begin(chosen, [row.length for row in rows], tokens, [list(row.pages) for row in rows])

    def gathered(self, sequence: int, layer: int) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values [length, K, D] that a sequence has in one layer."""
        row = self._find(sequence)
        ids = torch.tensor(row.pages, dtype=torch.int64, device=self.k.device)
        k, v = (pool[layer].index_select(0, ids).flatten(0, 1)[: row.length] for pool in (self.k, self.v))
        return k, v

    def _plan(self, rows: list[_Sequence], tokens: int) -> tuple[list[tuple[_Sequence, int]], int]:
        """The (row, table column) pairs to copy before writing, and the number of pages to add.

        Of n owners that write to a page in one step, the last keeps it if no other sequence holds it.
        """
        size, left = self.page_size, dict[int, int]()
        shared: list[tuple[_Sequence, int]] = []
        missing = 0
        for row in rows:
            end = -(-(row.length + tokens) // size)
            missing += max(0, end - len(row.pages))
            for column in range(row.length // size, min(end, len(row.pages)) if tokens else 0):
                page = row.pages[column]
                owners = left.setdefault(page, self._owners[page])
                if owners > 1:
                    shared.append((row, column))
                    left[page] = owners - 1
        return shared, missing

    def _copy(self, row: _Sequence, column: int) -> None:
        old, new = row.pages[column], self._take()
        used = row.length - column * self.page_size
        self._zero([new])
        for pool in (self.k, self.v):
            pool[:, new, :used] = pool[:, old, :used]
        for means in self._means.values():
            means.values[:, new] = means.values[:, old]
        row.pages[column] = new
        self._release(old)
        self.counters.copied += 1

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        self.counters.allocated += 1
        return page

    def _zero(self, pages: list[int]) -> None:
        dirty = [page for page in pages if self._dirty[page]]
        if dirty:
            ids = torch.tensor(dirty, dtype=torch.int64, device="cpu").to(self.k.device, non_blocking=True)
            self.k.index_fill_(1, ids, 0)
            self.v.index_fill_(1, ids, 0)
            self.counters.zeroed += len(dirty)
        for page in pages:
            self._dirty[page] = True

    def _release(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free.append(page)
            self.counters.freed += 1

    def _find(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise ValueError(f"sequence must be one that was allocated and not freed, got {sequence!r}")
        return self._sequences[sequence]

    def _advance(self, tokens: list[int]) -> None:
        for sequence, count in zip(self._stepping, tokens, strict=True):
            self._sequences[sequence].length += count
        self._stepping = []
