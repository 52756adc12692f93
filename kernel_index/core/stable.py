"""Functions whose bits do not depend on an element's place in its tensor, and sums in a fixed order.

PyTorch's loops on a CPU compute most elements by vectors and the last ones of a chunk by the C library, whose results
differ in the last bit; where a chunk ends depends on the number of elements and of threads.  Its sums too.  What is
correctly rounded (sums and products of two numbers, quotients, roots, comparisons, conversions) has the same bits
wherever it is computed.  So an invariant form is written with those operators and with the functions of this module.

A formula that has both forms takes one of the two as its ``math``: this module, or ``PYTORCH``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import native, ops
from kernel_index.core.inductor import sum_rows
from kernel_index.core.numerics import Recipe
from kernel_index.core.triton.launch import dense

SOURCE = Path(native.__file__).with_name("stable.cpp")

EXACT = Recipe("elementwise 1: correctly rounded operations in float32, one rounding at the end")
ELEMENTWISE = Recipe(
    "elementwise 2: correctly rounded operations and vector functions in float32, the same for every element; "
    "sums of a row by four interleaved vectors"
)


ON_A_GPU = Recipe(
    "elementwise on a GPU 1: operations in float32 by one kernel for every element; sums of a row by one program, in "
    "blocks that its width decides; one rounding at the end"
)


def _unary(name: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """On a GPU it is PyTorch's own, which computes every element alike."""

    def launch(x: Tensor) -> Tensor:
        x = x.contiguous()
        assert x.dtype == dtype
        y = torch.empty_like(x)
        _call(f"{name}_{native.suffix(dtype)}", (x.numel(),), x, y)
        return y

    native_op = ops.NativeOp(f"stable_{name}(Tensor x) -> Tensor", launch, lambda x: x.new_empty(x.shape))
    of_pytorch = getattr(torch, name)
    return lambda x: of_pytorch(x) if x.is_cuda else native_op(x)


def _launch_row_sum(x: Tensor) -> Tensor:
    x, y = x.contiguous(), x.new_empty(x.shape[:-1])
    _call("row_sum", (y.numel(), x.shape[-1]), x, y)
    return y


def _launch_column_sum(x: Tensor) -> Tensor:
    x, y = x.contiguous(), x.new_empty(x.shape[1:])
    _call("column_sum", (x.shape[0], y.numel()), x, y)
    return y


def _launch_pair_sums(x: Tensor, z: Tensor) -> Tensor:
    x, z = x.contiguous(), z.contiguous()
    y = x.new_empty(*x.shape[:-1], z.shape[-2])
    assert x.dtype == z.dtype == y.dtype == torch.float32
    if y.numel():
        sizes = (y.shape[:-2].numel(), x.shape[-2], z.shape[-2], x.shape[-1])
        native.call(SOURCE, "pair_sums", (*sizes, native.threads_for(y.numel() * x.shape[-1])), (), x, z, y)
    return y


pair_sums = ops.NativeOp(
    "stable_pair_sums(Tensor x, Tensor z) -> Tensor",
    _launch_pair_sums,
    lambda x, z: x.new_empty(*x.shape[:-1], z.shape[-2]),
)
"""``Σ_c x[…, i, c] · z[…, j, c]`` of float32, [..., I, J], each a sum of a row."""


def _call(function: str, sizes: tuple[int, ...], x: Tensor, y: Tensor) -> None:
    assert x.dtype == y.dtype
    if y.numel():
        native.call(SOURCE, function, (*sizes, native.threads_for(16 * x.numel())), (), x, y)


exp, log, log1p, tanh, erf, sigmoid = (
    _unary(name, torch.float32) for name in ("exp", "log", "log1p", "tanh", "erf", "sigmoid")
)
"""Of float32."""

cos, sin = (_unary(name, torch.float64) for name in ("cos", "sin"))
"""Of float64."""

_row_sum = ops.NativeOp("stable_row_sum(Tensor x) -> Tensor", _launch_row_sum, lambda x: x.new_empty(x.shape[:-1]))
_column_sum = ops.NativeOp(
    "stable_column_sum(Tensor x) -> Tensor", _launch_column_sum, lambda x: x.new_empty(x.shape[1:])
)


def _launch_device_row_sum(x: Tensor) -> Tensor:
    from kernel_index.core.triton.stable import row_sum

    (x,) = dense((x,))
    return row_sum(x, x.new_empty(x.shape[:-1]))


device_row_sum = ops.register(
    "device_row_sum(Tensor x) -> Tensor", _launch_device_row_sum, lambda x: x.new_empty(x.shape[:-1])
)


def row_sum(x: Tensor) -> Tensor:
    """The sum of float32 x over its last dimension."""
    return device_row_sum(x) if x.is_cuda else _row_sum(x)


def column_sum(x: Tensor) -> Tensor:
    """The sum of float32 x over its first dimension, in an order that the number of threads has no part in."""
    return x.sum(0) if x.is_cuda else _column_sum(x)


def row_mean(x: Tensor) -> Tensor:
    return row_sum(x) / x.shape[-1]


def total(x: Tensor) -> Tensor:
    """The sum of all elements, in a fixed order."""
    return row_sum(x.flatten())


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    e = exp(x - x.amax(-1, keepdim=True))
    return e / row_sum(e)[..., None]


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = exp(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class _Log(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return log(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / ctx.saved_tensors[0]


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = sigmoid(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * y * (1 - y)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = softmax(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        total = (g * y).sum(-1) if torch.is_grad_enabled() else row_sum(g * y)
        return y * (g - total[..., None])


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0) + log1p(exp(-x.abs()))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * sigmoid(ctx.saved_tensors[0])


_WITH_GRADIENT: Any = {"softplus": _Softplus, "exp": _Exp, "log": _Log, "sigmoid": _Sigmoid, "softmax": _Softmax}


def with_gradient(name: str, x: Tensor) -> Tensor:
    """``exp``, ``log``, ``sigmoid``, ``softmax`` or ``softplus`` of float32 x, differentiable."""
    return ops.apply(_WITH_GRADIENT[name], x)


def sum_of(terms: Tensor, dim: int) -> Tensor:
    """The sum over a short dimension, term by term in order: by additions alone, and so differentiable."""
    first, *others = terms.unbind(dim)
    for term in others:
        first = first + term
    return first


class _PyTorch:
    """The same functions of PyTorch, for any dtype."""

    exp, log, log1p, tanh, erf, sigmoid = torch.exp, torch.log, torch.log1p, torch.tanh, torch.erf, torch.sigmoid
    column_sum = staticmethod(sum_rows)

    @staticmethod
    def row_sum(x: Tensor) -> Tensor:
        return x.sum(-1)

    @staticmethod
    def total(x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def row_mean(x: Tensor) -> Tensor:
        return x.mean(-1)

    @staticmethod
    def softmax(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


PYTORCH: Any = _PyTorch


class _OnDevice(_PyTorch):
    """The same, with the total of a GPU in a fixed order."""

    @staticmethod
    def total(x: Tensor) -> Tensor:
        return device_row_sum(x.flatten())


ON_DEVICE: Any = _OnDevice
