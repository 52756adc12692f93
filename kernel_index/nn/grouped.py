"""PyTorch's grouped product, traceable in every dtype: its own fake refuses what its kernels take."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm


def _product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return grouped_mm(a, b, offs=offsets)


def _fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    groups = (offsets.shape[0],) if b.ndim == 2 else ()
    return a.new_empty((*groups, a.shape[0], b.shape[-1]))


torch.library.define("kernel_index::grouped_product", "(Tensor a, Tensor b, Tensor offsets) -> Tensor")
torch.library.impl("kernel_index::grouped_product", ("CPU", "CUDA"), _product)
torch.library.register_fake("kernel_index::grouped_product", _fake)
_op = torch.ops.kernel_index.grouped_product.default


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return _op(x, weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        g = g.contiguous()
        d_x = _op(g, weight, offsets) if ctx.needs_input_grad[0] else None
        d_weight = _op(g.T, x, offsets) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None


def grouped_product(x_SC: Tensor, weight_EFC: Tensor, offsets_E: Tensor) -> Tensor:
    """``x[s] · weight[e]ᵀ`` for the rows s of each group e, which end at ``offsets[e]``: [S, F].

    C and F must be multiples of 16 bytes: PyTorch's kernels ask for it.

    >>> import torch
    >>> weight = torch.stack([torch.ones(4, 4), torch.full((4, 4), 3.0)])
    >>> grouped_product(torch.ones(3, 4), weight, torch.tensor([1, 3], dtype=torch.int32))[:, 0]
    tensor([ 4., 12., 12.])
    """
    if torch.is_grad_enabled():
        return _Grouped.apply(x_SC, weight_EFC, offsets_E)
    return _op(x_SC, weight_EFC.transpose(1, 2), offsets_E)
