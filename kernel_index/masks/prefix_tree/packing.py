"""``TreePacking``: a tree of token runs as one row, in depth-first order."""

from typing import NamedTuple

import torch
from torch import Tensor


class Edges(NamedTuple):
    """Token ``source[e]`` predicts token ``target[e]``; int64 [E], targets ascending."""

    source: Tensor
    target: Tensor


class TreePacking(NamedTuple):
    """Where the runs of a tree stand in a row of S tokens; made by ``pack_tree``.

    ``order``: int64 [R], the runs as they stand in the row.  The others are int64 [S].  ``positions``: of each token on
    its path, 0 in a gap.  ``subtree_end``: the first index after everything that continues the token; in a gap the
    index itself, so that no query sees it.  ``parent_of``: the token that it continues, −1 at a root's first and in a
    gap.  ``edges``: every token but a root's first is the target of one edge, whose source is ``parent_of``.

    >>> import kernel_index as ki
    >>> ki.pack_tree([-1, 0, 0], [2, 1, 1], align=2).is_token.tolist()
    [True, True, True, False, True]
    """

    order: Tensor
    positions: Tensor
    subtree_end: Tensor
    parent_of: Tensor
    edges: Edges

    @property
    def is_token(self) -> Tensor:
        """Which places of the row hold a token, bool [S]; the others are gaps."""
        return self.subtree_end > torch.arange(self.subtree_end.shape[0])


def packed(parents: list[int], lengths: list[int], align: int) -> TreePacking:
    """The packing of a tree that ``contract.check_tree`` has checked."""
    order = _depth_first(parents)
    starts, firsts, last_ends = [0] * len(parents), [0] * len(parents), [0] * len(parents)
    end = 0
    for run in order:
        parent = parents[run]
        firsts[run] = 0 if parent < 0 else firsts[parent] + lengths[parent]
        starts[run] = end + (firsts[run] - end) % align
        end = starts[run] + lengths[run]
        last_ends[run] = end
    for run in reversed(order):  # children come after their parents
        if parents[run] >= 0:
            last_ends[parents[run]] = max(last_ends[parents[run]], last_ends[run])
    index = torch.arange(end)
    positions, subtree_end, parent_of = torch.zeros_like(index), index.clone(), torch.full_like(index, -1)
    for run in order:
        first, stop, parent = starts[run], starts[run] + lengths[run], parents[run]
        positions[first:stop] = torch.arange(firsts[run], firsts[run] + lengths[run])
        subtree_end[first:stop] = last_ends[run]
        parent_of[first:stop] = index[first:stop] - 1
        parent_of[first] = -1 if parent < 0 else starts[parent] + lengths[parent] - 1
    target = (parent_of >= 0).nonzero().flatten()
    return TreePacking(
        torch.tensor(order, dtype=torch.int64), positions, subtree_end, parent_of, Edges(parent_of[target], target)
    )


def _depth_first(parents: list[int]) -> list[int]:
    """Runs so that each is followed by everything that continues it; runs with one parent keep their order."""
    children: list[list[int]] = [[] for _ in parents]
    for run, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(run)
    waiting = [run for run, parent in enumerate(parents) if parent < 0][::-1]
    order = list[int]()
    while waiting:
        order.append(waiting.pop())
        waiting += reversed(children[order[-1]])
    return order


torch.serialization.add_safe_globals([TreePacking, Edges])
"""``torch.load`` takes a packing from files that are not trusted: it holds tensors alone."""
