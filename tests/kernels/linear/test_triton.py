"""``ki.linear`` in Triton, interpreted: a row's bits depend on that row alone, in both directions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import kernel_index as ki
from kernel_index.core.triton.hopper_products import parts_of
from kernel_index.core.triton.products import DECODING, FLOAT32, LARGE, SQUARE, tiles_of
from tests.interpreter import rows_alone

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's order of a sum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _rows_alone():
    with rows_alone():
        yield


def drawn(rows: int, width: int, features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    tensors = torch.randn(rows, width), torch.randn(features, width), torch.randn(features)
    return tuple(t.to(dtype) for t in tensors)


def linear(*tensors: torch.Tensor | None) -> torch.Tensor:
    with ki.numerics("invariant"):
        return ki.linear(*tensors, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "features"), [(64, 96), (130, 18)])
def test_a_row_does_not_depend_on_the_others(width, features, dtype):
    x, weight, bias = drawn(200, width, features, dtype)
    together = linear(x, weight, bias)
    for rows in (1, 2, 3, 17, 64, 128):
        for first in (0, 7, 200 - rows):
            part = slice(first, first + rows)
            assert torch.equal(linear(x[part], weight, bias), together[part]), (rows, first)
    order = torch.randperm(200)
    assert torch.equal(linear(x[order], weight, bias), together[order])


def test_other_rows_that_are_not_finite_change_nothing():
    x, weight, _ = drawn(40, 66, 32, torch.bfloat16)
    expected = linear(x, weight, None)
    x[3:30] = torch.nan
    assert torch.equal(linear(x, weight, None)[30:], expected[30:])


def test_gradients():
    """That of x has rows of its own; those of weight and bias have the same bits in every run."""
    x, weight, bias = drawn(100, 66, 34, torch.float32)
    upstream = torch.randn(100, 34)

    def gradients(x, upstream):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(linear(*leaves), leaves, upstream)

    expected = gradients(x, upstream)
    assert torch.equal(gradients(x[20:23], upstream[20:23])[0], expected[0][20:23])
    assert all(map(torch.equal, gradients(x, upstream), expected))


def test_auto_does_not_interpret():
    x, weight, _ = drawn(4, 8, 8, torch.float16)  # which no native kernel takes
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match="interpreted on a CPU: only when asked for"):
        ki.linear(x, weight)


def test_a_tile_has_sixty_four_rows_at_least(monkeypatch):
    """Below, a product is another instruction; and float32 has one tile, whose depth decides the order of its sums."""
    assert min(t.rows for t in (DECODING, SQUARE, LARGE)) == 64
    monkeypatch.setattr("kernel_index.core.triton.products.interpreting", lambda: False)
    assert {tiles_of(m, n, torch.float32) for m in (1, 5000) for n in (16, 9000)} == {FLOAT32}
    assert [tiles_of(m, 4096, torch.bfloat16) for m in (1, 64, 65, 8192)] == [DECODING, DECODING, SQUARE, LARGE]


COMPILE = """
import contextlib

import torch
from triton.runtime.jit import JITFunction

from kernel_index.core.triton import hopper_products as hopper
from kernel_index.proofs import aot

found = []
JITFunction.run = lambda kernel, *args, grid, warmup, **options: found.append(aot._launch(kernel, args, options))
hopper.on_device, hopper.processors = lambda x: contextlib.nullcontext(), lambda x: 132


def like(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


x, weight, d_y = like(4096, 2048), like(8192, 2048), like(4096, 8192)
with aot.pretend(aot.TARGETS["sm90"]):
    hopper.multiply(x, weight.T, like(8192), like(4096, 8192))
    hopper.multiply(d_y, weight, None, like(4096, 2048, dtype=torch.float32), add=True)
    hopper.multiply(d_y.T, x, None, like(8192, 2048))
    hopper.multiply_in_parts(d_y.T, x, like(8192, 2048), 3)
for launch in found:
    done = aot.compile_for("linear", launch, "sm90")
    print(done.kernel, done.error or "compiled", done.spilled)
"""


@pytest.mark.thorough
def test_the_product_of_many_rows_compiles_for_hopper():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    kernels = ["_product_kernel"] * 4 + ["_sum_in_order_kernel"]
    assert done.stdout.split() == [word for name in kernels for word in (name, "compiled", "0")]


@pytest.mark.parametrize(
    ("features", "width", "tokens"), [(512, 512, 32768), (128, 128, 105_600), (24, 2048, 32768), (2192, 512, 3000)]
)
def test_no_part_of_a_sum_is_empty(features, width, tokens):
    a, b = torch.empty(features, tokens, device="meta"), torch.empty(tokens, width, device="meta")
    parts, steps = parts_of(a, b), -(-tokens // 64)
    assert (parts - 1) * -(-steps // parts) < steps
