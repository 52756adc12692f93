"""The registered ops of ``triton`` and their autograd Functions: a token's rows are written and read by their slots."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.experts.expert_dispatch.contract import Combine


def _allocate_plan(experts, count):
    return torch.empty_like(experts, dtype=torch.int32, memory_format=torch.contiguous_format), experts.new_empty(
        (count,), dtype=torch.int32
    )


def _launch_plan(experts, count):
    from kernel_index.kernels.experts.expert_dispatch import triton

    slots, offsets = _allocate_plan(experts, count)
    triton.plan(experts.contiguous(), slots, offsets)
    return slots, offsets


def _allocate_rows(x, slots):
    return x.new_empty((slots.shape[0] * slots.shape[1], x.shape[1]))


def _launch_dispatch(x, slots):
    from kernel_index.kernels.experts.expert_dispatch import triton

    rows = _allocate_rows(x, slots)
    triton.dispatch(x.contiguous(), slots.contiguous(), rows)
    return rows


def _allocate_sums(rows, weights, slots, base):
    return rows.new_empty((slots.shape[0], rows.shape[1]))


def _launch_combine(rows, weights, slots, base):
    """Without weights the sum of a token's rows, which is the gradient of the dispatch."""
    from kernel_index.kernels.experts.expert_dispatch import triton

    out = _allocate_sums(rows, weights, slots, base)
    rows, weights, slots, base = launch.dense((rows, weights, slots, base))
    triton.combine(rows, weights, slots, base, out)
    return out


def _allocate_gradients(g, rows, weights, slots):
    return torch.empty_like(rows, memory_format=torch.contiguous_format), torch.empty_like(
        weights, memory_format=torch.contiguous_format
    )


def _launch_combine_backward(g, rows, weights, slots):
    from kernel_index.kernels.experts.expert_dispatch import triton

    found = _allocate_gradients(g, rows, weights, slots)
    g, rows, weights, slots = launch.dense((g, rows, weights, slots))
    triton.combine_backward(g, rows, weights, slots, *found)
    return found


_plan_op = ops.register("expert_plan(Tensor experts, SymInt count) -> (Tensor, Tensor)", _launch_plan, _allocate_plan)
_dispatch_op = ops.register("expert_dispatch(Tensor x, Tensor slots) -> Tensor", _launch_dispatch, _allocate_rows)
_combine_op = ops.register(
    "expert_combine(Tensor rows, Tensor? weights, Tensor slots, Tensor? base) -> Tensor",
    _launch_combine,
    _allocate_sums,
)
_combine_backward_op = ops.register(
    "expert_combine_backward(Tensor g, Tensor rows, Tensor weights, Tensor slots) -> (Tensor, Tensor)",
    _launch_combine_backward,
    _allocate_gradients,
)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return _dispatch_op(x, slots)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            wide = torch.promote_types(g.dtype, torch.float32)
            return _rows_of(g, slots).to(wide).sum(1).to(g.dtype), None
        return _combine_op(g, None, slots, None), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, slots: Tensor, base: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weights, slots)
        return _combine_op(rows, weights, slots, base)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        d_rows = d_weights = None
        if torch.is_grad_enabled() or any(ctx.needs_input_grad[:2]):
            found = _with_history if torch.is_grad_enabled() else _combine_backward_op
            d_rows, d_weights = found(g, *ctx.saved_tensors)
        return d_rows, d_weights, None, g if ctx.needs_input_grad[3] else None


def _rows_of(rows: Tensor, slots: Tensor) -> Tensor:
    """Each token's rows, [N, k, C]."""
    return rows.index_select(0, slots.flatten().long()).view(*slots.shape, rows.shape[1])


def _with_history(g: Tensor, rows: Tensor, weights: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    upstream = g.to(wide)[:, None]
    d_pairs = (upstream * weights.to(wide)[..., None]).flatten(0, 1).to(rows.dtype)
    d_rows = torch.zeros_like(rows).index_copy(0, slots.flatten().long(), d_pairs)
    return d_rows, (upstream * _rows_of(rows, slots).to(wide)).sum(-1).to(weights.dtype)


def plan_triton(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return _plan_op(experts, count)


def dispatch_triton(x: Tensor, slots: Tensor) -> Tensor:
    return ops.apply(_Dispatch, x, slots)


def combine_triton(call: Combine) -> Tensor:
    return ops.apply(_Combine, *call)
