"""Each group by the product whose rows do not depend on each other: an expert's load has no part in a row."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.products import product, product_d_input, product_d_weight
from kernel_index.core.triton.launch import dense


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows."""
    ends = offsets.tolist()
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            yield group, slice(start, end)


def _launch(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = _allocate(x, weight, offsets)
    for group, rows in _groups(offsets):
        y[rows] = product.launch(x[rows], weight[group], None, x.dtype)
    return y


def _launch_triton(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    from kernel_index.kernels.experts.grouped_product import triton

    y, (x, weight, offsets) = _allocate(x, weight, offsets), dense((x, weight, offsets))
    return triton.multiply(x, weight.transpose(1, 2), offsets, y)


def _allocate(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _launch_d_input(d_y: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    d_x = _allocate_d_input(d_y, weight, offsets)
    for group, rows in _groups(offsets):
        d_x[rows] = product_d_input.launch(d_y[rows], weight[group])
    return d_x


def _launch_triton_d_input(d_y: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    from kernel_index.kernels.experts.grouped_product import triton

    d_x, (d_y, weight, offsets) = _allocate_d_input(d_y, weight, offsets), dense((d_y, weight, offsets))
    return triton.multiply(d_y, weight, offsets, d_x)


def _allocate_d_input(d_y: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return d_y.new_empty(d_y.shape[0], weight.shape[2])


def _launch_d_weight(d_y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    d_weight = _allocate_d_weight(d_y, x, offsets).zero_()
    for group, rows in _groups(offsets):
        d_weight[group] = product_d_weight.launch(d_y[rows], x[rows])
    return d_weight


def _launch_triton_d_weight(d_y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    from kernel_index.kernels.experts.grouped_product import triton

    d_weight, (d_y, x, offsets) = _allocate_d_weight(d_y, x, offsets), dense((d_y, x, offsets))
    return triton.multiply_weights(d_y, x, offsets, d_weight)


def _allocate_d_weight(d_y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return d_y.new_empty(offsets.shape[0], d_y.shape[1], x.shape[1])


class _By(NamedTuple):
    """The three products on one kind of device."""

    product: Callable[..., Tensor]
    d_input: Callable[..., Tensor]
    d_weight: Callable[..., Tensor]


_SCHEMAS = (
    ("", "(Tensor x, Tensor weight, Tensor offsets) -> Tensor", _allocate),
    ("_d_input", "(Tensor d_y, Tensor weight, Tensor offsets) -> Tensor", _allocate_d_input),
    ("_d_weight", "(Tensor d_y, Tensor x, Tensor offsets) -> Tensor", _allocate_d_weight),
)


def _registered(name: str, register: Callable[..., Any], *launchers: Callable[..., Tensor]) -> _By:
    made = zip(_SCHEMAS, launchers, strict=True)
    return _By(*(register(f"{name}{part}{schema}", launch, fake) for (part, schema, fake), launch in made))


_NATIVE = _registered("grouped_rows", ops.NativeOp, _launch, _launch_d_input, _launch_d_weight)


def _on_device(schema: str, launch: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.partial(ops.run, ops.register(schema, launch, fake), launch)


_TRITON = _registered(
    "device_grouped_rows", _on_device, _launch_triton, _launch_triton_d_input, _launch_triton_d_weight
)


class _GroupedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, by: _By) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.by = by
        return by.product(x, weight, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        d_x = ctx.by.d_input(d_y, weight, offsets) if ctx.needs_input_grad[0] else None
        d_weight = ctx.by.d_weight(d_y, x, offsets) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None, None


def grouped_product_native(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return ops.apply(_GroupedRows, x, weight, offsets, _NATIVE)


def grouped_product_triton(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return ops.apply(_GroupedRows, x, weight, offsets, _TRITON)
