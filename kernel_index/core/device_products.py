"""Products whose rows do not depend on the other rows, on a GPU: the registered ops of ``core/triton/products.py``.

The same three as in ``core/products.py``.  ``y[m, n] = Σ_r x[m, r] · weight[n, r]`` is summed in float32 in one
accumulator by rising r, whatever the number of rows.
"""

import torch
from torch import Tensor

from kernel_index.core import ops, rules
from kernel_index.core.numerics import Recipe
from kernel_index.core.products import Products
from kernel_index.core.triton.launch import dense

PRODUCT = Recipe(
    "product on a GPU 1: one float32 accumulator by rising index, tensor cores in tiles of 64 rows or more, FMA for "
    "float32 in steps of 32, bias added to the sum, one rounding"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(*tensors: Tensor | None) -> str | None:
    if any(t is not None and t.dtype not in DTYPES for t in tensors):
        return rules.NEEDS_TRITON_DTYPE
    return rules.triton_why_not(*tensors)


def _multiply(
    a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor, add: bool = False, in_parts: bool = False
) -> Tensor:
    from kernel_index.core.triton.products import multiply

    return multiply(a, b, bias, y, add=add, in_parts=in_parts)


def launch_rows(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``product`` inside of another op."""
    x, weight, bias = dense((x, weight, bias))
    return _multiply(x, weight.T, bias, _allocate(x, weight, bias, dtype))


def _allocate(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _launch_d_input(d_y: Tensor, weight: Tensor) -> Tensor:
    return _multiply(d_y.contiguous(), weight.contiguous(), None, _allocate_d_input(d_y, weight))


def _allocate_d_input(d_y: Tensor, weight: Tensor) -> Tensor:
    return d_y.new_empty(d_y.shape[0], weight.shape[1])


def _launch_d_weight(d_y: Tensor, x: Tensor) -> Tensor:
    return _multiply(d_y.contiguous().T, x.contiguous(), None, _allocate_d_weight(d_y, x), in_parts=True)


def _allocate_d_weight(d_y: Tensor, x: Tensor) -> Tensor:
    return d_y.new_empty(d_y.shape[1], x.shape[1])


product = ops.register(
    "device_product(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor", launch_rows, _allocate
)
"""x [M, R] · weightᵀ [R, N] + bias [N], in ``dtype``."""

product_d_input = ops.register(
    "device_product_d_input(Tensor d_y, Tensor weight) -> Tensor", _launch_d_input, _allocate_d_input
)
"""d_y [M, N] · weight [N, R]."""

product_d_weight = ops.register(
    "device_product_d_weight(Tensor d_y, Tensor x) -> Tensor", _launch_d_weight, _allocate_d_weight
)
"""d_yᵀ [N, M] · x [M, R]: a sum over tokens, in an order that the sizes decide."""


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``product`` without its op: for what reads the device itself."""
    return ops.run_launcher(launch_rows, x, weight, bias, dtype)


def write_product(y: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """y = a·b + bias, in place."""
    ops.run_launcher(_multiply, a, b, *dense((bias,)), y)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b of float32 total, in one accumulator: by parts of the summed dimension the bits are the same."""
    ops.run_launcher(_multiply, a, b, None, total, True)


TRITON = Products(
    lambda *args: ops.run(product, launch_rows, *args),
    lambda *args: ops.run(product_d_input, _launch_d_input, *args),
    lambda *args: ops.run(product_d_weight, _launch_d_weight, *args),
)
