"""A tree as runs of tokens, read on the host: a row of many thousand tokens has few of them.

A stretch is a run in which each token continues the one before it.  What routes takes a stretch with the path that
leads to it (``paths``); a recurrence takes the runs between branches level by level.
"""

import bisect
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.transfers import to_device, values_of
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.prefix_tree.bounds import parents_of


class Stretch(NamedTuple):
    """``tokens`` of a row; the first continues token ``above`` of the row's stretch ``parent``, −1 for none."""

    tokens: range
    above: int
    parent: int


class Level(NamedTuple):
    """R runs that begin where runs of the level before end; L is the longest of them.

    ``index``: int64 [R, L], places in the B·T tokens of the batch; a shorter run repeats its last token.  ``is_token``:
    bool [R, L], False for the repeated ones, of which a level that ``is_full`` has none.  ``parent``: int64 [R], the
    run before it, counted over all levels; −1 for roots, which are all on the first level.  ``before``: int64 [R], the
    last token of that run, −1 for roots.
    """

    index: Tensor
    is_token: Tensor
    parent: Tensor
    before: Tensor
    is_full: bool


def parents_in_row(subtree_end: Tensor | None, sizes: Sizes) -> Tensor:
    """The token that each token continues, int64 [rows, S], −1 for none; on the device, without a wait."""
    index = torch.arange(sizes.keys, device=sizes.device)
    if subtree_end is None:
        return index[None] - 1
    ends = torch.atleast_2d(subtree_end).to(torch.int64)
    parent = parents_of(ends, rules.host_readable(ends))
    return torch.where(ends > index, parent, -1)


def stretches_of(subtree_end: Tensor | None, tokens: int) -> list[list[Stretch]]:
    """The stretches of each row, ascending; reads values.  None is one chain of all tokens."""
    if subtree_end is None:
        return [[Stretch(range(tokens), -1, -1)] if tokens else []]
    if subtree_end.is_meta:
        raise ValueError("subtree_end must hold values where a tree is taken apart, got a tensor on the meta device")
    if rules.inside_dispatch_mode() or torch._C._functorch.is_batchedtensor(subtree_end):
        raise ValueError("subtree_end must hold values where a tree is taken apart, got one inside a mode or a vmap")
    ends = np.atleast_2d(values_of(subtree_end))
    index = np.arange(tokens)
    real = ends > index
    starts = real.copy()
    starts[:, 1:] &= ends[:, :-1] <= index[1:]
    stops = starts | ~real
    stops[:, 1:] &= starts[:, 1:] | real[:, :-1]  # of a gap the first token
    found = [list[Stretch]() for _ in ends]
    limits = [*np.argwhere(stops).tolist(), [len(ends), 0]]
    for ((row, start), (row_after, limit)), begins in zip(pairwise(limits), starts[stops].tolist(), strict=True):
        if begins:
            tokens_of_it = range(start, limit if row_after == row else tokens)
            found[row].append(Stretch(tokens_of_it, *_above(ends[row], found[row], start)))
    return found


def _above(ends: np.ndarray, before: list[Stretch], token: int) -> tuple[int, int]:
    """The last token before ``token`` whose subtree holds it, and its stretch; (−1, −1) for a root."""
    at = len(before) - 1
    while at >= 0 and ends[before[at].tokens.start] <= token:
        at = before[at].parent
    if at < 0:
        return -1, -1
    closed = bisect.bisect_left(before[at].tokens, True, key=lambda i: ends[i] <= token)  # subtrees lie in each other
    return before[at].tokens.start + closed - 1, at


class _Run(NamedTuple):
    first: int  # place in the batch
    length: int
    parent: int  # among the runs of all rows, −1 for none
    level: int


def levels_of(rows: Sequence[list[Stretch]], sizes: Sizes) -> tuple[Level, ...]:
    """The levels of a batch, from the stretches of its rows."""
    runs = list[_Run]()
    for b in range(sizes.batch):
        runs += _runs_of_row(rows[b % len(rows)], b * sizes.keys, len(runs))
    by_level: dict[int, list[int]] = {}
    for i, run in enumerate(runs):
        by_level.setdefault(run.level, []).append(i)
    place, found = dict[int, int](), list[Level]()
    for _, members in sorted(by_level.items()):
        parents = [(place.get(runs[i].parent, -1), runs[i].parent) for i in members]
        last = [-1 if run < 0 else runs[run].first + runs[run].length - 1 for _, run in parents]
        found.append(_level([runs[i] for i in members], [at for at, _ in parents], last, sizes.device))
        place |= {i: len(place) + j for j, i in enumerate(members)}
    return tuple(found)


def _runs_of_row(stretches: list[Stretch], offset: int, first: int) -> list[_Run]:
    """The stretches, cut after each token from which others branch; ``first`` runs are those of the rows before."""
    cuts = [set[int]() for _ in stretches]
    for stretch in stretches:
        if stretch.parent >= 0:
            cuts[stretch.parent].add(stretch.above + 1)
    found, run_of = list[_Run](), dict[int, int]()
    for stretch, inside in zip(stretches, cuts, strict=True):
        start, limit = stretch.tokens.start, stretch.tokens.stop
        bounds = sorted(inside | {start, limit})
        before = stretch.above
        for begin, end in pairwise(bounds):
            parent = run_of.get(before, -1)
            level = 0 if parent < 0 else found[parent - first].level + 1
            run_of[end - 1] = first + len(found)
            found.append(_Run(offset + begin, end - begin, parent, level))
            before = end - 1
    return found


def _level(runs: list[_Run], parents: list[int], before: list[int], device: torch.device) -> Level:
    table = torch.tensor([[run.first for run in runs], [run.length for run in runs], parents, before])
    first, length, parent, last = to_device(table, device)
    lengths = [run.length for run in runs]
    at = torch.arange(max(lengths), device=device)
    index = first[:, None] + torch.minimum(at, length[:, None] - 1)
    return Level(index, at < length[:, None], parent, last, min(lengths) == max(lengths))


def along(paths: list[tuple[range, ...]], longest: int, device: torch.device) -> Tensor:
    """The tokens of paths of stretches, int64 [n, longest]; the last of each is repeated."""
    most = max(map(len, paths))
    parts = [(*path, *[range(0)] * (most - len(path))) for path in paths]
    table = torch.tensor([[[part.start for part in path] for path in parts], [list(map(len, path)) for path in parts]])
    first, length = to_device(table, device)
    stop = length.cumsum(1)
    at = torch.minimum(torch.arange(longest, device=device), stop[:, -1:] - 1)
    part = torch.searchsorted(stop, at.contiguous(), right=True)
    return at + (first - stop + length).gather(1, part)
