"""One packing for one set of documents: whoever packs them by their content gets the same rows from every batch."""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

WIDEST = 8
"""Rows are at most this many times as long as the longest document."""

WASTE = 1 / 16
"""Padding, as a share of the tokens, with which no longer rows are tried."""


LIBRARIES = frozenset({"torch", "transformers", "accelerate", "deepspeed"})
"""Whose hooks on layers do not look at rows."""


HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class Packing(NamedTuple):
    """Where tokens stand: ``places`` [N] in the caller's rows, ``slots`` [N] in rows of ``shape``.

    ``number`` and ``offset`` [N]: a token's document, and its place in it.  ``lengths``: of each row's documents, in
    their order.
    """

    places: Tensor
    slots: Tensor
    number: Tensor
    offset: Tensor
    shape: torch.Size
    lengths: list[list[int]]

    def rows(self, values: Tensor, padding: int) -> Tensor:
        """The caller's values, in rows of this packing."""
        flat = values.new_full((self.shape.numel(),), padding)
        return flat.index_copy(0, self.slots, values.flatten()[self.places]).reshape(self.shape)

    def taken(self, values: Tensor) -> Tensor:
        """Values [*shape, …] of the tokens alone, [N, …]."""
        return values.flatten(0, 1).index_select(0, self.slots)


def packed_by_content(document: Tensor, places: Tensor, *words: Tensor) -> Packing:
    """Pack documents into rows, in an order that their content alone decides.

    Args:
        document: int64 [N], which document a token belongs to; its tokens keep their order.
        places: int64 [N], where the token stands.
        words: int64 [N] each, what tells tokens apart.

    A hash of 64 bits tells documents apart.  Those that are alike keep the order in which they come.

    >>> import torch
    >>> tokens, places = torch.tensor([5, 6, 7, 8, 9]), torch.arange(5)
    >>> one = packed_by_content(torch.tensor([0, 0, 1, 1, 1]), places, tokens)
    >>> other = packed_by_content(torch.tensor([0, 0, 0, 1, 1]), places, tokens[[2, 3, 4, 0, 1]])
    >>> torch.equal(one.rows(tokens, 0), other.rows(tokens[[2, 3, 4, 0, 1]], 0))
    True
    """
    _, document, counts = document.unique(return_inverse=True, return_counts=True)
    by_document = document.argsort(stable=True)
    document = document[by_document]
    offset = torch.arange(len(document), device=document.device) - (counts.cumsum(0) - counts)[document]
    hashes = hashed(offset, *(word[by_document] for word in words))
    order = torch.zeros_like(counts).index_add_(0, document, hashes).argsort(stable=True)
    counts = counts[order].tolist()
    rows, width = _in_rows(counts)
    lengths = [[counts[i] for i in row] for row in rows]
    first = [0] * len(counts)
    for at, row in enumerate(rows):
        for i, start in zip(row, itertools.accumulate(lengths[at], initial=at * width), strict=False):
            first[i] = start
    number = inverse(order)[document]
    slots = torch.tensor(first, device=document.device)[number] + offset
    again = slots.argsort()
    shape = torch.Size((len(rows), width))
    return Packing(places[by_document][again], slots[again], number[again], offset[again], shape, lengths)


def _in_rows(lengths: Sequence[int]) -> tuple[list[list[int]], int]:
    """The documents of each row, and the rows' length: short ones, as long as they waste little."""
    longest, total = max(lengths), sum(lengths)
    best, width = list[list[int]](), 0
    for times in range(1, WIDEST + 1):
        wide = min(times * longest, total)
        rows = best_fit(lengths, wide)
        if not best or len(rows) * wide < len(best) * width:
            best, width = rows, wide
        if len(best) * width - total <= WASTE * total:
            break
    return best, width


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of the numbers of what they hold: longest first, each to the fullest row that still has room for it."""
    rows: list[list[int]] = []
    free_rows: list[tuple[int, int]] = []  # (free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free_rows, (lengths[i], -1))
        if at == len(free_rows):
            rows.append([])
            free, row = width, len(rows) - 1
        else:
            free, row = free_rows.pop(at)
        rows[row].append(i)
        if free > lengths[i]:
            bisect.insort(free_rows, (free - lengths[i], row))
    return rows


def scattered(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Values [N, …] at their places in rows of a shape, [*shape, …]; 0 where nothing stands."""
    flat = values.new_zeros(shape.numel(), *values.shape[1:])
    return flat.index_copy(0, places, values).reshape(*shape, *values.shape[1:])


def hooked(model: nn.Module) -> str | None:
    """A part of a model with a hook that is not of a library which we know: it may look at rows."""
    for name, module in model.named_modules():
        for hook in (hook for kind in HOOKS for hook in getattr(module, kind).values()):
            home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
            if name and home.split(".")[0] not in LIBRARIES:
                return name
    return None


def inverse(order: Tensor) -> Tensor:
    """The permutation [N] that undoes a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def hashed(*words: Tensor) -> Tensor:
    """64 bits of whole numbers, int64, element by element: a sum of multiples that have no simple relation, then mixed.

    Source: S. Vigna's splitmix64, its increment and its two multiplications; integer products wrap around.
    """
    found = words[0] * _signed(_multiple(1))
    for i, word in enumerate(words[1:], 2):
        found = torch.add(found, word, alpha=_signed(_multiple(i)))
    found = (found ^ _shifted(found, 30)) * _signed(FIRST)
    found = (found ^ _shifted(found, 27)) * _signed(SECOND)
    return found ^ _shifted(found, 31)


INCREMENT, FIRST, SECOND, BITS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


def _multiple(i: int) -> int:
    """The i-th number of splitmix64 from 0, made odd, so that no word loses a bit."""
    x = i * INCREMENT & BITS
    x = (x ^ x >> 30) * FIRST & BITS
    x = (x ^ x >> 27) * SECOND & BITS
    return (x ^ x >> 31) | 1


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, without copies of the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
