"""The op's autograd Function and the registered op: PyTorch's grouped product, traceable in every dtype.

PyTorch's own fake of ``grouped_mm`` refuses dtypes that its kernels take; the registered op has a fake that does not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from kernel_index.core import ops


def _launch(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    if a.numel() == 0:  # no rows: PyTorch's kernels check the strides of an empty tensor, which mean nothing
        return _allocate(a, b, offsets).zero_()
    return grouped_mm(a, b, offs=offsets)


def _allocate(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """[S, C] · [E, C, F] to [S, F], or for the gradient of weight [F, S] · [S, C] to [E, F, C]."""
    groups = (offsets.shape[0],) if b.ndim == 2 else ()
    return a.new_empty((*groups, a.shape[0], b.shape[-1]))


_op = ops.register("grouped_product(Tensor a, Tensor b, Tensor offsets) -> Tensor", _launch, _allocate)


class _Kept(torch.autograd.Function):
    """Keeps what the product needs for backward before it runs, in a node of its own.

    A checkpoint ends its recomputation where the last kept tensor is there.  A Python function's are taken when it has
    run: the product itself would be repeated.
    """

    @staticmethod
    def forward(ctx: Any, nodes: list[Any], x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, offsets)
        nodes.append(ctx)
        return x.view_as(x), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor | None, d_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, d_x, d_weight, None


class _GroupedProduct(torch.autograd.Function):
    """``nodes``: that of ``_Kept``; empty in a trace, where this function keeps the tensors itself."""

    @staticmethod
    def forward(ctx: Any, nodes: list[Any], x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.nodes = nodes
        if not nodes:
            ctx.save_for_backward(x, weight, offsets)
        return _op(x, weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = (ctx.nodes[0] if ctx.nodes else ctx).saved_tensors
        g = g.contiguous()
        d_x = _op(g, weight, offsets) if ctx.needs_input_grad[1] else None
        d_weight = _op(g.T, x, offsets) if ctx.needs_input_grad[2] else None
        return None, d_x, d_weight, None


def grouped_product_op(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    x, weight, offsets = x.contiguous(), weight.contiguous(), offsets.contiguous()
    if torch.is_grad_enabled():
        nodes: list[Any] = []
        if not torch.compiler.is_compiling() and (x.requires_grad or weight.requires_grad):
            x, weight = ops.apply(_Kept, nodes, x, weight, offsets)
        return ops.apply(_GroupedProduct, nodes, x, weight, offsets)
    return _op(x, weight.transpose(1, 2), offsets)
