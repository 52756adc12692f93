"""Named calls of ``linear``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.linear.linear.api import BACKENDS, linear


def call(m: Maker, rows: tuple[int, ...], width: int, features: int, bias: bool = False) -> dict[str, Any]:
    tensors = {"x": m.normal(*rows, width), "weight": m.normal(features, width)}
    return tensors | ({"bias": m.normal(features)} if bias else {})


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.einsum("...c,fc->...f", x, weight)
    return y if bias is None else y + bias


CASES = (
    Case("layer", "a batch of rows with a bias", lambda m: call(m, (3, 50), 96, 160, bias=True)),
    Case("one", "a single token, as in decoding", lambda m: call(m, (1,), 64, 130)),
    Case("vector", "no leading dimension", lambda m: call(m, (), 32, 16)),
    Case("long", "more features than a block of the sum", lambda m: call(m, (20,), 2050, 18)),
    Case("odd", "odd widths: bfloat16 is multiplied in pairs", lambda m: call(m, (7,), 33, 17)),
    Case("none", "no rows at all", lambda m: call(m, (0,), 16, 8)),
)


def compulsory(kwargs: dict[str, Any]) -> tuple[int, int]:
    x, weight = kwargs["x"], kwargs["weight"]
    read, out = size_of(x, weight), x.numel() // x.shape[-1] * weight.shape[0] * x.element_size()
    return read + out, 2 * read + out


SUITES = (
    Suite(
        op="linear", function=linear, backends=BACKENDS, cases=CASES, differentiable=("x", "weight", "bias"),
        oracle=oracle, sized=lambda m, n: call(m, (n,), 32, 16), rounding=("native", "torch"), double_backward=True,
        real=lambda m, rows=8192: call(m, (rows,), 4096, 4096), compulsory=compulsory,
    ),
)  # fmt: skip
