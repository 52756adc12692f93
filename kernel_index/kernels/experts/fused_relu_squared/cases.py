"""Named calls of ``fused_relu_squared``."""

import torch

from kernel_index.core.testing import Case, Suite, size_of
from kernel_index.kernels.experts.fused_relu_squared.api import BACKENDS, fused_relu_squared

CASES = (
    Case("expert", "an expert's hidden activations: tokens × features", lambda m: {"x": m.normal(48, 96)}),
    Case("odd", "no dimension is a multiple of a vector width", lambda m: {"x": m.normal(3, 5, 17)}),
    Case("scalar", "rank 0", lambda m: {"x": m.normal()}),
    Case("empty", "an expert without tokens", lambda m: {"x": m.normal(0, 96)}),
    Case("expanded", "a stride of 0", lambda m: {"x": m.normal(1, 33).expand(7, 33)}),
    Case("transposed", "not contiguous", lambda m: {"x": m.normal(9, 31).t()}),
)

SUITES = (
    Suite(
        op="fused_relu_squared", function=fused_relu_squared, backends=BACKENDS, cases=CASES,
        differentiable=("x",), oracle=lambda x: torch.nn.functional.relu(x).square(),
        sized=lambda m, n: {"x": m.normal(n, 24)},
        real=lambda m, rows=8192: {"x": m.normal(rows, 4096)},
        compulsory=lambda call: (2 * size_of(call["x"]), 3 * size_of(call["x"])), double_backward=True,
        nonfinite=("x",),
    ),
)  # fmt: skip
