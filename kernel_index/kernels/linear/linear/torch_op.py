"""The product with independent rows and both gradients, in C++ or in Triton."""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import device_products, ops, products
from kernel_index.core.products import Products
from kernel_index.kernels.linear.linear.contract import Call


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by = by
        return by.product(x, weight, bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            return d_y @ weight, d_y.T @ x, d_y.sum(0) if needs[2] else None, None
        d_y = d_y.contiguous()
        d_x = ctx.by.d_input(d_y, weight) if needs[0] else None
        d_weight = ctx.by.d_weight(d_y, x) if needs[1] else None
        # A sum over tokens too: the product with a column of ones has a fixed order, whatever the number of threads.
        d_bias = ctx.by.d_weight(d_y, d_y.new_ones(d_y.shape[0], 1))[:, 0] if needs[2] else None
        return d_x, d_weight, d_bias, None


def _linear(call: Call, by: Products) -> Tensor:
    x, weight, bias = call
    if x.ndim == 2:
        return ops.apply(_Linear, x, weight, bias, by)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would not tell a dimension from none of 0
    return ops.apply(_Linear, flat, weight, bias, by).view(*x.shape[:-1], weight.shape[0])


def linear_native(call: Call) -> Tensor:
    return _linear(call, products.NATIVE)


def linear_triton(call: Call) -> Tensor:
    return _linear(call, device_products.TRITON)
