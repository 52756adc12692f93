"""The runs of a tree by levels: what a recurrence computes together, once the states that it begins with are known."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.prefix_tree.bounds import parents_of


class Level(NamedTuple):
    """R runs that begin where runs of earlier levels end; L is the longest of them.

    ``index``: int64 [R, L], places in the B·T tokens of the batch; a shorter run repeats its last token.  ``is_token``:
    bool [R, L], False for the repeated ones, and ``tokens`` int64 [n], where it is True in the R·L.  ``parent``: int64
    [R], the run before it, counted over all levels; −1 for roots, which are all on the first level.  ``before``: int64
    [R], the last token of that run, −1 for roots.
    """

    index: Tensor
    is_token: Tensor
    tokens: Tensor
    parent: Tensor
    before: Tensor


def parents_in_row(subtree_end: Tensor | None, sizes: Sizes) -> Tensor:
    """The token that each token continues, int64 [rows, S], −1 for none; on the device, without a wait."""
    index = torch.arange(sizes.keys, device=sizes.device)
    if subtree_end is None:
        return index[None] - 1
    ends = torch.atleast_2d(subtree_end).to(torch.int64)
    parent = parents_of(ends, rules.host_readable(ends))
    return torch.where(ends > index, parent, -1)


class _Run(NamedTuple):
    tokens: Tensor  # places in the batch
    parent: int
    level: int


def levels_of(subtree_end: Tensor | None, parents: Tensor, sizes: Sizes) -> tuple[Level, ...]:
    """The levels of a batch; reads values."""
    if parents.is_meta:
        raise ValueError("subtree_end must hold values where a tree is taken apart, got a tensor on the meta device")
    tokens, parents = sizes.keys, parents.cpu()
    real = torch.ones(1, tokens, dtype=torch.bool)
    if subtree_end is not None:
        real = torch.atleast_2d(subtree_end.detach().cpu()) > torch.arange(tokens)
    runs = list[_Run]()
    for b in range(sizes.batch):
        runs += _runs_of_row(parents[b % len(parents)], real[b % len(real)], b * tokens, len(runs))
    by_level: dict[int, list[int]] = {}
    for i, run in enumerate(runs):
        by_level.setdefault(run.level, []).append(i)
    place, found = dict[int, int](), list[Level]()
    for level in sorted(by_level):
        of_level = [runs[i] for i in by_level[level]]
        found.append(_level(of_level, [place.get(run.parent, -1) for run in of_level], runs, sizes.device))
        place |= {i: len(place) + j for j, i in enumerate(by_level[level])}
    return tuple(found)


def _runs_of_row(parent: Tensor, real: Tensor, offset: int, first: int) -> list[_Run]:
    """Stretches without a branch inside; ``first`` runs are those of the rows before."""
    index = torch.arange(parent.shape[0])
    children = torch.bincount(parent[real & (parent >= 0)], minlength=parent.shape[0])
    alone = (parent >= 0) & (children[parent.clamp(min=0)] == 1)
    starts = (real & ~((parent == index - 1) & alone)).nonzero().flatten().tolist()
    found, run_of = list[_Run](), dict[int, int]()
    for start, limit in zip(starts, [*starts, parent.shape[0]][1:], strict=True):
        tokens = index[start:limit][real[start:limit]]
        before = run_of.get(int(parent[start]), -1)
        level = 0 if before < 0 else found[before - first].level + 1
        run_of[int(tokens[-1])] = first + len(found)
        found.append(_Run(offset + tokens, before, level))
    return found


def _level(of_level: list[_Run], parents: list[int], runs: list[_Run], device: torch.device) -> Level:
    lengths = torch.tensor([len(run.tokens) for run in of_level])[:, None]
    index = torch.nn.utils.rnn.pad_sequence([run.tokens for run in of_level], batch_first=True)
    at = torch.arange(index.shape[1])
    index = index.gather(1, torch.minimum(at, lengths - 1))
    is_token = at < lengths
    before = torch.tensor([-1 if run.parent < 0 else int(runs[run.parent].tokens[-1]) for run in of_level])
    tokens = is_token.flatten().nonzero().flatten()
    return Level(*(x.to(device) for x in (index, is_token, tokens, torch.tensor(parents), before)))
