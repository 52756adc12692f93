"""Products whose rows do not depend on the other rows: the C++ kernels behind ``linear`` and the invariant loss.

``y[m, n] = Σ_r x[m, r] · weight[n, r]`` is summed in float32: over blocks of 1024 r, in each by rising r in one
accumulator (bfloat16: by pairs, as the machine's instruction adds them), and one block after the other.  oneDNN's
brgemm computes a block, or a loop of our own on a CPU without AVX-512.  An element depends on its own row and column
alone, as ``tests/kernels/linear`` asks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import native, ops
from kernel_index.core.numerics import Recipe

SOURCE = Path(native.__file__).with_name("products.cpp")

PRODUCT = Recipe(
    "product 1: float32 sums over blocks of 1024, brgemm by rising index within a block, blocks added in order, "
    "bias added to the sum, one rounding"
)


def _in_pairs(x: Tensor, dim: int) -> Tensor:
    """Padded with zeros to an even size: bfloat16 is multiplied in pairs."""
    if x.dtype != torch.bfloat16 or x.shape[dim] % 2 == 0:
        return x.contiguous()
    return torch.cat((x, torch.zeros_like(x.narrow(dim, 0, 1))), dim)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y, x, weight = _allocate(x, weight, bias, dtype), _in_pairs(x, 1), _in_pairs(weight, 1)
    added = y.new_empty(0, dtype=torch.float32) if bias is None else native.floats(bias)
    _call(f"forward_{native.suffix(x.dtype)}_{native.suffix(dtype)}", x, weight, bias is not None, x, weight, added, y)
    return y


def _allocate(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _launch_d_input(d_y: Tensor, weight: Tensor) -> Tensor:
    d_x, d_y, weight = _allocate_d_input(d_y, weight), _in_pairs(d_y, 1), _in_pairs(weight, 0)
    _call(f"d_input_{native.suffix(d_y.dtype)}", d_y, weight, 0, d_y, weight, d_x)
    return d_x


def _allocate_d_input(d_y: Tensor, weight: Tensor) -> Tensor:
    return d_y.new_empty(d_y.shape[0], weight.shape[1])


def _launch_d_weight(d_y: Tensor, x: Tensor) -> Tensor:
    d_weight, d_y, x = _allocate_d_weight(d_y, x), d_y.contiguous(), x.contiguous()
    _call(f"d_weight_{native.suffix(d_y.dtype)}", d_y, d_weight, 0, d_y, x, d_weight)
    return d_weight


def _allocate_d_weight(d_y: Tensor, x: Tensor) -> Tensor:
    return d_y.new_empty(d_y.shape[1], x.shape[1])


def _call(function: str, rows: Tensor, weight: Tensor, flag: int, *tensors: Tensor) -> None:
    if 0 not in tensors[-1].shape:
        threads = native.threads_for(rows.shape[0] * weight.numel())
        sizes = (rows.shape[0], *weight.shape, threads, flag)
        native.call(SOURCE, function, sizes, (), *tensors)


product = ops.NativeOp(
    "row_product(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor", _launch, _allocate
)
"""x [M, R] · weightᵀ [R, N] + bias [N], in ``dtype``."""

product_d_input = ops.NativeOp(
    "row_product_d_input(Tensor d_y, Tensor weight) -> Tensor", _launch_d_input, _allocate_d_input
)
"""d_y [M, N] · weight [N, R]."""

product_d_weight = ops.NativeOp(
    "row_product_d_weight(Tensor d_y, Tensor x) -> Tensor", _launch_d_weight, _allocate_d_weight
)
"""d_yᵀ [N, M] · x [M, R]: a sum over tokens, in the order of their rows."""


class Products(NamedTuple):
    """The product and its gradients on one kind of device."""

    product: Callable[..., Tensor]
    d_input: Callable[..., Tensor]
    d_weight: Callable[..., Tensor]


NATIVE = Products(product, product_d_input, product_d_weight)


def _launch_batch(left: Tensor, right: Tensor) -> Tensor:
    y, left, right = _allocate_batch(left, right), left.contiguous(), right.contiguous()
    if y.numel():
        threads = native.threads_for(y.numel() * left.shape[2])
        native.call(SOURCE, "batch_float32", (*left.shape[:2], *right.shape[1:], threads), (), left, right, y)
    return y


def _allocate_batch(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[1], right.shape[1])


_batch = ops.NativeOp("row_product_batch(Tensor left, Tensor right) -> Tensor", _launch_batch, _allocate_batch)


class _BatchProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _batch(left, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return _batch(g, right.transpose(1, 2)), _batch(g.transpose(1, 2), left.transpose(1, 2))


def batch_product(left: Tensor, right: Tensor) -> Tensor:
    """left [..., M, R] times right [..., N, R] transposed, float32, pair by pair as ``product``, with gradients."""
    found = ops.apply(_BatchProduct, left.flatten(0, -3), right.flatten(0, -3))
    return found.unflatten(0, left.shape[:-2])
