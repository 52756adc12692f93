"""Named calls of the row gathers."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.sparse.row_gather.api import BACKENDS, gather_rows, gather_rows_pair


def one(m: Maker, rows: int, heads: int, width: int, indices: int, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    return {"src": m.normal(rows, heads, width), "idx": m.integers(0, rows, indices, dtype=dtype)}


def pair(m: Maker, rows: int, heads: int, widths: tuple[int, int], indices: int) -> dict[str, Any]:
    a, b = (m.normal(rows, heads, width) for width in widths)
    return {"a": a, "b": b, "idx": m.integers(0, rows, indices)}


CASES = (
    Case("stage", "rows repeat and some are never selected", lambda m: one(m, 24, 2, 16, 31)),
    Case("odd", "no dimension is a power of two", lambda m: one(m, 7, 3, 17, 5, torch.int32)),
    Case("one row", "every index is the same row", lambda m: one(m, 1, 2, 8, 40)),
    Case("wide", "several blocks of elements in a row", lambda m: one(m, 3, 5, 500, 4)),
    Case("no indices", "nothing was selected", lambda m: one(m, 6, 2, 8, 0)),
    Case("strided", "a view of a cache", lambda m: one(m, 9, 2, 8, 6) | {"src": m.normal(2, 9, 8).transpose(0, 1)}),
)

PAIRS = (
    Case("keys and values", "of one width", lambda m: pair(m, 24, 2, (16, 16), 31)),
    Case("two widths", "as in latent attention", lambda m: pair(m, 9, 1, (24, 17), 12)),
    Case(
        "mixed",
        "values in float32",
        lambda m: pair(m, 9, 2, (8, 8), 12) | {"b": m.normal(9, 2, 8, dtype=torch.float32)},
    ),
    Case("no indices", "nothing was selected", lambda m: pair(m, 6, 2, (8, 4), 0)),
)


def select(source: Tensor, idx: Tensor) -> Tensor:
    return source[idx.long()]


def moved(call: dict[str, Any], sources: tuple[str, ...]) -> tuple[int, int]:
    """A row that several indices select is read once; backward reads a row of each index, and writes the source."""
    idx, whole = call["idx"], sum(size_of(call[name]) for name in sources)
    row = whole // call[sources[0]].shape[0]
    indices, distinct = idx.shape[0], idx.unique().numel()
    return size_of(idx) + (distinct + indices) * row, size_of(idx) + whole + indices * row


SUITES = (
    Suite(
        op="gather_rows", function=gather_rows, backends=BACKENDS, cases=CASES, differentiable=("src",),
        oracle=lambda src, idx: select(src, idx), sized=lambda m, n: one(m, 6, 2, 4, n),
        double_backward=True, nonfinite=("src",), real=lambda m, rows=65536: one(m, 8192, 8, 128, rows),
        compulsory=lambda call: moved(call, ("src",)),
    ),
    Suite(
        op="gather_rows_pair", function=gather_rows_pair, backends=BACKENDS, cases=PAIRS,
        differentiable=("a", "b"), oracle=lambda a, b, idx: (select(a, idx), select(b, idx)),
        sized=lambda m, n: pair(m, 6, 2, (4, 3), n),
        double_backward=True, nonfinite=("a", "b"),
        real=lambda m, rows=65536: pair(m, 8192, 8, (128, 128), rows),
        compulsory=lambda call: moved(call, ("a", "b")),
    ),
)  # fmt: skip
