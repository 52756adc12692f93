"""Rectangles of queries × keys that together hold every score that the mask allows; planned on the host."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import RowBounds, Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract

QUERIES = 256
"""Queries of a rectangle that needs a mask: a window of W keys then costs (W + QUERIES) / W of its own scores."""

SMALL = 128 * 128
"""Neighbours are joined while their rectangle has at most this many scores: one call costs tens of microseconds."""

RUN = 64
"""A tree is cut into the pieces of its runs where they have as many tokens on the average: each piece is a call."""


class Rectangle(NamedTuple):
    """Queries ``q`` of the rows ``batch`` against the keys ``k``; only ``tree_pieces`` share queries with each other.

    ``k`` is a slice, or in a tree the ascending indices of keys.  ``kind``: ``full`` where every pair is allowed,
    ``causal`` for the lower triangle of a square, else ``masked``.
    """

    batch: slice
    q: slice
    k: slice | Tensor
    kind: str


class Bounds(NamedTuple):
    """The intervals of one row as lists."""

    start: list[int]
    end: list[int]


def rectangles_of(mask: MaskContract, sizes: Sizes, *, whole: bool) -> tuple[Rectangle, ...]:
    """Pieces that hold every query with a key; queries without one are in none, or in a masked one.

    ``whole`` leaves a document that is one square triangle or rectangle uncut, for a kernel that takes it as such.
    """

    def build() -> tuple[Rectangle, ...]:
        bounds = mask.row_bounds(sizes)
        found: list[Rectangle] = []
        for row in range(sizes.rows):
            rows = range(sizes.batch) if sizes.rows == 1 and not whole else [row]
            batch = slice(0, sizes.batch) if sizes.rows == 1 and whole else None
            of_row = (
                _row_rectangles(bounds.start[row], bounds.end[row], whole)
                if bounds.q_end is None
                else _tree_rectangles(bounds.start[row], bounds.end[row], bounds.q_end[row])
            )
            found += [p._replace(batch=batch or slice(b, b + 1)) for b in rows for p in of_row]
        return tuple(found)

    return mask.remember("pieces_whole" if whole else "rectangles", sizes, build)


def tree_pieces(mask: MaskContract, sizes: Sizes) -> tuple[Rectangle, ...]:
    """A tree as squares and rectangles without a mask; none where a path is cut, or its runs are short.

    A run is a square of its own tokens, and a rectangle for all that comes after it in its subtree.  So a query stands
    in one piece for each run of its path, whose results are merged by their log-sum-exp.
    """

    def build() -> tuple[Rectangle, ...]:
        bounds = mask.row_bounds(sizes)
        if bounds.q_end is None or sizes.queries != sizes.keys:
            return ()
        found: list[Rectangle] = []
        for row in range(sizes.rows):
            of_row = _pieces_of_runs(bounds.start[row], bounds.end[row], bounds.q_end[row])
            if of_row is None:
                return ()
            batch = slice(0, sizes.batch) if sizes.rows == 1 else slice(row, row + 1)
            found += [piece._replace(batch=batch) for piece in of_row]
        return tuple(found)

    return mask.remember("pieces of a tree", sizes, build) if mask.is_tree else ()


def _pieces_of_runs(start: Tensor, end: Tensor, q_end: Tensor) -> list[Rectangle] | None:
    index = torch.arange(start.shape[0])
    real = q_end > index
    first = real.clone()  # of a run, whose keys are seen by the same queries
    first[1:] &= (q_end[1:] != q_end[:-1]) | ~real[:-1]
    runs = first.nonzero().flatten()
    if len(runs) * RUN > int(real.sum()) or not torch.equal(end[real], index[real] + 1):
        return None
    found: list[Rectangle] = []
    for run, until in zip(runs.tolist(), q_end[runs].tolist(), strict=True):
        others = (q_end[run:until] != until).nonzero()
        stop = run + int(others[0]) if len(others) else until
        if bool((start[run:until] > run).any() | (end[stop:until] < stop).any()):
            return None
        keys = slice(run, stop)
        found.append(Rectangle(slice(0), keys, keys, "causal"))
        if until > stop:
            found.append(Rectangle(slice(0), slice(stop, until), keys, "full"))
    return found


def _row_rectangles(start: Tensor, end: Tensor, whole: bool) -> list[Rectangle]:
    bounds = Bounds(start.tolist(), end.tolist())
    found: list[Rectangle] = []
    for q0, q1 in _runs(start, end):
        rectangle = _rectangle(bounds, q0, q1)
        if whole and rectangle.kind != "masked":
            parts = [rectangle]
        else:
            parts = [_rectangle(bounds, t, min(t + QUERIES, q1)) for t in range(q0, q1, QUERIES)]
        for part in parts:
            joined = _joined(found[-1], part) if found else None
            if joined is None:
                found.append(part)
            else:
                found[-1] = joined
    return found


def _tree_rectangles(start: Tensor, end: Tensor, q_end: Tensor) -> list[Rectangle]:
    """Chunks of queries, each against the keys that one of its queries sees: those of a path, mostly."""
    bounds = RowBounds(start[None], end[None], q_end[None])
    found: list[Rectangle] = []
    for t in range(0, start.shape[0], QUERIES):
        q = slice(t, min(t + QUERIES, start.shape[0]))
        some = end[q] > start[q]
        if not bool(some.any()):
            continue
        low, high = int(start[q][some].min()), int(end[q][some].max())
        keys = (q_end[low:high] > t).nonzero().flatten() + low
        whole = bool(bounds.allowed(q, keys).all())
        found.append(Rectangle(slice(0), q, keys, "full" if whole else "masked"))
    return found


def _runs(start: Tensor, end: Tensor) -> list[tuple[int, int]]:
    """Maximal runs of queries that have keys; a new run begins where a query shares no key with the one before."""
    if start.shape[0] == 0:
        return []
    some = end > start
    cut = torch.ones_like(some)
    cut[1:] = (some[1:] != some[:-1]) | (start[1:] >= end[:-1])
    first = cut.nonzero().flatten()
    stops = [*first[1:].tolist(), start.shape[0]]
    return [(q0, q1) for q0, q1, kept in zip(first.tolist(), stops, some[first].tolist(), strict=True) if kept]


def _rectangle(bounds: Bounds, q0: int, q1: int) -> Rectangle:
    """Within a run an end moves by 0 or 1 from query to query, so its first and last value tell all of it."""
    start, end = bounds
    k0, k1, n = start[q0], end[q1 - 1], q1 - q0
    kind = "masked"
    if start[q1 - 1] == k0:
        if end[q0] == k1:
            kind = "full"
        elif end[q0] == k0 + 1 and k1 == k0 + n:
            kind = "causal"
    return Rectangle(slice(0), slice(q0, q1), slice(k0, k1), kind)


def _joined(a: Rectangle, b: Rectangle) -> Rectangle | None:
    assert isinstance(a.k, slice)
    assert isinstance(b.k, slice)
    q, k = slice(a.q.start, b.q.stop), slice(a.k.start, b.k.stop)
    return Rectangle(slice(0), q, k, "masked") if (q.stop - q.start) * (k.stop - k.start) <= SMALL else None


def allowed_within(bounds: RowBounds, rectangle: Rectangle) -> Tensor:
    """Bool [rows, queries, keys] for a rectangle."""
    rows, keys = slice(None) if bounds.start.shape[0] == 1 else rectangle.batch, rectangle.k
    if isinstance(keys, slice):
        keys = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=bounds.start.device)
    return bounds.each(lambda x: x[rows]).allowed(rectangle.q, keys)
