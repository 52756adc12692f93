"""The op's autograd Function, shared by every compiled backend, and the registered ops of ``triton``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.kernels.experts.fused_relu_squared import inductor


def _launch_forward(x: Tensor) -> Tensor:
    from kernel_index.kernels.experts.fused_relu_squared import triton

    return triton.forward(x, allocate(x))


def _launch_backward(x: Tensor, g: Tensor) -> Tensor:
    from kernel_index.kernels.experts.fused_relu_squared import triton

    return triton.backward(x, g, allocate(x))


def allocate(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


PASSES = {
    "triton": ops.Passes(
        ops.register("relu_squared(Tensor x) -> Tensor", _launch_forward, allocate),
        ops.register("relu_squared_backward(Tensor x, Tensor g) -> Tensor", _launch_backward, allocate),
    ),
    "inductor": ops.Passes(inductor.forward, inductor.backward),
}


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return PASSES[backend].forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            return inductor.gradient(x, g), None
        return PASSES[ctx.backend].backward(x, g), None


def relu_squared_inductor(x: Tensor) -> Tensor:
    return ops.apply(_ReluSquared, x, "inductor")


def relu_squared_triton(x: Tensor) -> Tensor:
    return ops.apply(_ReluSquared, x, "triton")
