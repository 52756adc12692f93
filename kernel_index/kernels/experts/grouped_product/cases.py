"""Named calls of ``grouped_product``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.experts.grouped_product.api import BACKENDS, grouped_product


def call(m: Maker, counts: tuple[int, ...], width: int, hidden: int) -> dict[str, Any]:
    """Rows of ``width`` elements, so many for each group, to ``hidden``."""
    offsets = torch.tensor(counts).cumsum(0).to(dtype=torch.int32, device=m.device)
    return {"x": m.normal(sum(counts), width), "weight": m.normal(len(counts), hidden, width), "offsets": offsets}


def oracle(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A matrix of its own for each row."""
    group_S = (torch.arange(len(x), device=x.device)[:, None] >= offsets).sum(1)
    return torch.einsum("sc,sfc->sf", x, weight[group_S])


CASES = (
    Case("experts", "groups of different sizes", lambda m: call(m, (5, 9, 2, 16), 24, 40)),
    Case("idle", "the first, the last and one more expert receive no token", lambda m: call(m, (0, 7, 0, 4, 0), 16, 8)),
    Case("one", "a single group: an ordinary product", lambda m: call(m, (11,), 8, 16)),
    Case("none", "no token at all", lambda m: call(m, (0, 0), 16, 8)),
    Case("odd", "widths that PyTorch's grouped kernels do not take", lambda m: call(m, (3, 0, 4), 7, 5)),
)


def compulsory(kwargs: dict[str, Any]) -> tuple[int, int]:
    x, weight = kwargs["x"], kwargs["weight"]
    read, out = size_of(x, weight), len(x) * weight.shape[1] * x.element_size()
    return read + out, 2 * read + out


SUITES = (
    Suite(
        op="grouped_product", function=grouped_product, backends=BACKENDS, cases=CASES,
        differentiable=("x", "weight"), oracle=oracle, sized=lambda m, n: call(m, (n, 0, 3), 16, 8),
        real=lambda m, rows=8192: call(m, (rows // 8,) * 8, 1024, 2048), compulsory=compulsory,
        nonfinite=("x", "weight"),
    ),
)  # fmt: skip
