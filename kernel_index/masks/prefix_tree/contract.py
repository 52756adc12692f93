"""Argument checks of ``pack_tree``, and of the fields of a ``MaskContract`` that describe a tree."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kernel_index.core import checks
from kernel_index.core.transfers import values_of

TREE_HAS_NO_INTERVALS = "in a prefix tree the keys of a query are not one interval"


def integers(name: str, value: Any) -> list[int]:
    """A list of Python integers from a sequence, an array or an integer tensor of rank 1."""
    if isinstance(value, Tensor):
        checks.is_integer_tensor(name, value)
        checks.has_rank(name, value, 1, "one number for each run, [R]")
        checks.has_values(name, value, "cpu")
        return value.tolist()
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a sequence of integers, got {type(value).__name__}")
    for i, number in enumerate(value):
        checks.is_int(f"{name}[{i}]", number)
    return list(value)


def check_tree(parents: Any, lengths: Any, align: Any) -> tuple[list[int], list[int]]:
    """The checked lists; raises ``ValueError`` that names the first run that is wrong."""
    parents, lengths = integers("parents", parents), integers("lengths", lengths)
    checks.is_int("align", align, minimum=1)
    if len(parents) != len(lengths):
        raise ValueError(f"lengths must have one number for each of the {len(parents)} runs, got {len(lengths)}")
    for run, parent in enumerate(parents):
        if run == 0 and parent != -1:
            raise ValueError(f"parents[0] must be -1: no run comes before the first, got {parent}")
        if not -1 <= parent < run:
            raise ValueError(f"parents[{run}] must be an earlier run, 0 to {run - 1}, or -1 for a root, got {parent}")
    for run, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{run}] must be at least 1, got {length}")
    return parents, lengths


def check_rows(name: str, value: Any) -> None:
    """An integer tensor [B, S], or [S] for every row alike."""
    if value is None:
        return
    checks.is_integer_tensor(name, value)
    if value.ndim not in (1, 2):
        raise ValueError(f"{name} must be [B, S], or [S] for every row alike, got shape {tuple(value.shape)}")


def check_tree_mask(causal: bool, has_prefix: bool) -> None:
    """Raise for what a mask over a tree excludes."""
    if has_prefix:
        raise ValueError("prefix must be left out in a tree: its keys are seen along the path alone, got one")
    if not causal:
        raise ValueError("causal must be True in a tree: a query sees keys of its path, got False")


def check_nested(subtree_end: Tensor) -> None:
    """Raise unless the subtrees of every row are nested; reads values, so only for tensors on the host.

    A run is a maximal stretch of tokens with one ``subtree_end``.  Costs O(S) for the tokens and a step for each run.
    """
    rows = np.atleast_2d(values_of(subtree_end))
    index = np.arange(rows.shape[1])
    outside = (rows < index) | (rows > rows.shape[1])
    if outside.any():
        row, token = np.argwhere(outside)[0].tolist()
        at = token if subtree_end.ndim == 1 else f"{row}, {token}"
        raise ValueError(
            f"subtree_end[{at}] must be from {token} (a gap) to {rows.shape[1]}, got {int(rows[row, token])}"
        )
    changes = rows > index
    changes[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    for i, (row, change) in enumerate(zip(rows, changes, strict=True)):
        starts = change.nonzero()[0]
        _check_row(starts.tolist(), row[starts].tolist(), "" if subtree_end.ndim == 1 else f"of row {i} ")


def _check_row(starts: list[int], ends: list[int], of_row: str) -> None:
    """``starts`` of the runs of a row, ascending, and the ends of their subtrees; ``of_row`` names it."""
    around = list[tuple[int, int, int]]()
    for run, (start, end) in enumerate(zip(starts, ends, strict=True)):
        while around and around[-1][2] <= start:
            around.pop()
        if around and around[-1][2] < end:
            outer, first, last = around[-1]
            raise ValueError(
                f"subtree_end must nest: run {run} {of_row}at {start} must end by {last}, where the subtree of run "
                f"{outer} at {first} ends, got {end}"
            )
        around.append((run, start, end))
