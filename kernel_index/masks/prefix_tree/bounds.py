"""A tree as bounds: each query's first key on its path, and for each key the end of the queries that see it.

On its path, the keys of a query ascend, so a window is a first key.  The path itself needs one number for each key: a
query sees key s while it stands inside the subtree of s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.masks.doc_window_mask.intervals import Intervals, RowBounds

LONGEST_ROW_BITS = 24
"""A trace follows pointers through 16 million tokens, or siblings, of a row."""


class Tree(NamedTuple):
    """The fields of a contract: ``subtree_end`` and ``positions`` [rows or 1, S] or None, ``left`` of the window.

    ``whole``: the keys of a path begin at the first of the row, so there are no documents.
    """

    subtree_end: Tensor | None
    positions: Tensor | None
    left: int | None
    whole: bool


def tree_bounds(bounds: Intervals, position: Tensor, tree: Tree, keys: int, clipped: bool) -> RowBounds:
    """The bounds of every query, int32 [rows, T] and [rows, S].

    Where values may be read, a row of chains has intervals: it runs as documents do, with the same bits.

    Args:
        bounds: the intervals of the queries by causality, documents and counts, without a window.
        position: of each query among the keys, [rows or 1, T].
        tree: what the contract says.
        keys: S.
        clipped: whether the interval of a query may end before its own key.
    """
    start, end = bounds
    rows, index = start.shape[0], torch.arange(keys, device=start.device)
    until = torch.full_like(index, keys)[None] if tree.subtree_end is None else tree.subtree_end.to(torch.int64)
    at = position.clamp(0, max(keys - 1, 0)).expand(start.shape)
    end = torch.where((position < 0) | (position >= keys), start, end)
    readable = rules.host_readable(start, until)
    gaps = until <= index
    has_gaps = not readable or bool(gaps.any())
    along_path = tree.left is not None and tree.positions is not None  # else a window counts indices
    all_above = tree.left is None and tree.whole and not clipped  # up to the root
    parent = parents_of(until, readable) if along_path or clipped or (has_gaps and not all_above) else None
    if tree.left is not None:
        if tree.positions is not None and parent is not None:
            along = tree.positions.to(torch.int64)
            _check_increase(along, parent, gaps, readable)
            first = torch.where(gaps, 0, window_starts(parent, along, tree.left))  # a gap's position says nothing
            first = first.expand(rows, -1).gather(1, at)
        else:
            first = position - tree.left
        start = torch.minimum(torch.maximum(start, first), end)
    if all_above and has_gaps and keys:
        held = torch.nn.functional.pad(until.cummax(1).values[:, :-1] > index[1:], (1, 0))
        nothing = (gaps & ~held).expand(rows, -1).gather(1, at)  # a gap sees the path above it
        end = torch.where(nothing, start, end)
    elif parent is not None and (has_gaps or clipped):
        latest = torch.where(gaps, parent, index).expand(rows, -1).gather(1, at)  # a gap sees the path above it
        latest = _last_before(latest, end, parent) if clipped else latest
        end = torch.where(latest >= start, end, start)
    if readable and not has_gaps and (root := _roots_of_chains(until, index)) is not None:
        start = torch.minimum(torch.maximum(start, root.expand(rows, -1).gather(1, at)), end)
        start, end = _in_order(start, end)
        return RowBounds(start.to(torch.int32), end.to(torch.int32), None)
    first_query = position[:, :1] if position.shape[1] else torch.zeros_like(until[:, :1])
    q_end = (until - first_query).clamp(0, position.shape[1])
    return RowBounds(*(x.to(torch.int32).contiguous() for x in (start, end, q_end.expand(rows, -1))))


def _in_order(start: Tensor, end: Tensor) -> Intervals:
    """The same intervals, with empty ones where both bounds never decrease: at the end of those before."""
    some = start < end
    before = torch.where(some, end, 0)
    before = before.cummax(1).values if before.shape[1] else before
    return Intervals(torch.where(some, start, before), torch.where(some, end, before))


def _check_increase(along: Tensor, parent: Tensor, gaps: Tensor, readable: bool) -> None:
    """Raise where positions that may be read do not increase along a path."""
    if not readable or not rules.host_readable(along) or along.shape[1] == 0:
        return
    along, parent = torch.broadcast_tensors(along, parent)
    wrong = (parent >= 0) & ~gaps & (along <= along.gather(1, parent.clamp(min=0)))
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0, 1])
        raise ValueError(f"positions must increase along each path, got {int(along[wrong][0])} at token {token}")


def _last_before(token: Tensor, end: Tensor, parent: Tensor) -> Tensor:
    """The last of the token and its ancestors, [rows, T], that stands before ``end``; −1 if none does."""
    parent = parent.expand(token.shape[0], -1)
    for step in _steps_up(parent, _bits(parent.shape[1])):
        higher = _taken(step, token)
        token = torch.where(higher >= end, higher, token)
    return torch.where(token >= end, _taken(parent, token), token)


def _taken(step: Tensor, token: Tensor) -> Tensor:
    """Where a step leads from each token; −1 from −1."""
    return torch.where(token >= 0, step.gather(1, token.clamp(min=0)), -1)


def _steps_up(parent: Tensor, bits: int) -> list[Tensor]:
    """The ancestors 2ᵏ tokens up, the farthest first: with each taken or left, a walk may have any length."""
    found = [parent]
    while len(found) < bits:
        found.append(_taken(found[-1], found[-1]))
    return found[::-1]


def _roots_of_chains(until: Tensor, index: Tensor) -> Tensor | None:
    """The root of each token [rows, S] where no token has two continuations, else None; reads values."""
    inside = torch.nn.functional.pad(until.cummax(1).values[:, :-1] > index[1:], (1, 0))
    continues = torch.nn.functional.pad(until[:, :-1] > index[1:], (1, 0))
    if not torch.equal(inside, continues):  # a token whose path leaves out the token before it
        return None
    return torch.where(inside, 0, index).cummax(1).values


def parents_of(subtree_end: Tensor, readable: bool) -> Tensor:
    """The last earlier token whose subtree holds each token, −1 for none; int64 [rows, S].

    A token continues the one before it, or, where subtrees end, what the first of these continues; a gap and the token
    after it continue what the place before them continues.  Pointers to those are followed by doubling: the number of
    rounds is the logarithm of the siblings in a row, and of S where values may not be read.
    """
    rows, keys = subtree_end.shape
    index = torch.arange(keys, device=subtree_end.device).expand(rows, -1)
    if keys == 0:
        return index.clone()
    real = subtree_end > index
    ending = torch.full((rows, keys + 1), keys, device=subtree_end.device)
    ending = ending.scatter_reduce(1, torch.where(real, subtree_end, keys), index, "amin")[:, :keys]
    before = (index - 1).clamp(min=0)
    continues = real.gather(1, before) & (subtree_end.gather(1, before) > index) & (index > 0)
    pointer = torch.where(ending < index, ending, before)
    pointer = torch.where(continues | (index == 0), index, pointer)
    for _ in range(_bits(keys)):
        further = pointer.gather(1, pointer)
        if readable and torch.equal(further, pointer):
            break
        pointer = further
    return torch.where(continues, index - 1, -1).gather(1, pointer)


def _bits(keys: int) -> int:
    """Bits of an index; in a trace those of the longest row, so that one graph serves every length."""
    return LONGEST_ROW_BITS if torch.compiler.is_compiling() else keys.bit_length()


def window_starts(parent: Tensor, along: Tensor, left: int) -> Tensor:
    """The first token of each token's path whose position is at most ``left`` behind, [rows, S]; itself if none is."""
    rows, keys = max(parent.shape[0], along.shape[0]), parent.shape[1]
    first = torch.arange(keys, device=parent.device).expand(rows, -1)
    if keys == 0:
        return first
    parent, along = parent.expand(rows, -1), along.expand(rows, -1)
    least = along - left
    for step in _steps_up(parent, min(left.bit_length(), _bits(keys))):
        higher = step.gather(1, first)
        inside = (higher >= 0) & (along.gather(1, higher.clamp(min=0)) >= least)
        first = torch.where(inside, higher, first)
    return first
