"""The product in C++, its rows independent of each other, with both gradients."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.products import product, product_d_input, product_d_weight
from kernel_index.kernels.linear.linear.contract import Call


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            return d_y @ weight, d_y.T @ x, d_y.sum(0) if needs[2] else None
        d_y = d_y.contiguous()
        d_x = product_d_input(d_y, weight) if needs[0] else None
        d_weight = product_d_weight(d_y, x) if needs[1] else None
        # A sum over tokens too: the product with a column of ones has a fixed order, whatever the number of threads.
        d_bias = product_d_weight(d_y, d_y.new_ones(d_y.shape[0], 1))[:, 0] if needs[2] else None
        return d_x, d_weight, d_bias


def linear_native(call: Call) -> Tensor:
    x, weight, bias = call
    flat = x.reshape(-1, x.shape[-1])
    return ops.apply(_Linear, flat, weight, bias).view(*x.shape[:-1], weight.shape[0])
