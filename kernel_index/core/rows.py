"""Rows taken by index, some more than once: their gradients are added up in float32, in a fixed order."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops, rules


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gradients of duplicates are added up in."""
    return torch.promote_types(dtype, torch.float32)


def add_up(g: Tensor, idx: Tensor, rows: int) -> Tensor:
    """Row n is the sum of the rows of g that came from it, in a fixed order."""
    wide = sum_dtype(g.dtype)
    sums = torch.zeros((rows, *g.shape[1:]), dtype=wide, device=g.device)
    if g.device.type == "cpu" or torch.is_grad_enabled():
        return sums.index_add(0, idx, g.to(wide)).to(g.dtype)
    return sums.index_put((idx,), g.to(wide), accumulate=True).to(g.dtype)  # sorted on a GPU, where index_add is not


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.rows = x.shape[0]
        return x.index_select(0, idx)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (idx,) = ctx.saved_tensors
        return add_up(g, idx, ctx.rows), None


def taken(x: Tensor, idx: Tensor) -> Tensor:
    """The rows ``idx`` [n] of x [rows, …]."""
    if rules.inside_functorch():
        return x.index_select(0, idx)
    return ops.apply(_Taken, x, idx)
