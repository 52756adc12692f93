"""The registered ops of the kernels that go by lists of queries, and their two passes."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.attention_function import (
    Backward,
    Forward,
    Gradients,
    Passes,
    attend,
    forward_by_log2,
    sink_gradient_by_log2,
)
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.sparse.block_sparse_attention.lists import (
    ListPlan,
    allocate_list_plan,
    launch_of,
    part_of,
    row_bytes,
)
from kernel_index.routing.legal_blocks import num_blocks


def _allocate(q, k, v, order, items, parts, k_start, k_end, block_size, group, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _launch(q, k, v, order, items, parts, k_start, k_end, block_size, group, scale, softcap):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_lists

    outputs = _allocate(q, k, v, order, items, parts, k_start, k_end, block_size, group, scale, softcap)
    q, k, v = map(dense_heads, (q, k, v))
    how = launch_of("forward", q, k, v, block_size, group, scale, softcap)
    return triton_lists.forward(q, k, v, ListPlan(order, items, parts), (k_start, k_end), how, outputs)


def _allocate_backward(
    d_out, d_lse, q, k, v, out, log2_sum, order, items, parts, k_start, k_end, block_size, group, scale, softcap
):
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), torch.empty_like(log2_sum)


def _launch_backward(
    d_out, d_lse, q, k, v, out, log2_sum, order, items, parts, k_start, k_end, block_size, group, scale, softcap
):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_lists_backward

    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    d_out, q, k, v = map(dense_heads, (d_out, q, k, v))
    how = launch_of("backward", q, k, v, block_size, group, scale, softcap)
    plan, bounds = ListPlan(order, items, parts), (k_start, k_end)
    delta = triton_lists_backward.delta_of(d_out, d_lse, out, how)
    of_rows = d_out, log2_sum, delta
    triton_lists_backward.backward(of_rows, q, k, v, plan, bounds, how, (d_q, d_k, d_v))
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), delta


def _plan(selected, selected_valid, num_blocks, row_bytes, part):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_plan

    return triton_plan.list_plan(selected, selected_valid, num_blocks, row_bytes, part)


_plan_op = ops.register(
    "block_sparse_list_plan(Tensor selected, Tensor? selected_valid, SymInt num_blocks, int row_bytes, int part) -> "
    "(Tensor, Tensor, Tensor)",
    _plan,
    allocate_list_plan,
)
_forward_op = ops.register(
    "block_sparse_lists(Tensor q, Tensor k, Tensor v, Tensor order, Tensor items, Tensor parts, Tensor k_start, "
    "Tensor k_end, int block_size, int group, float? scale, float softcap) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "block_sparse_lists_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor order, Tensor items, Tensor parts, Tensor k_start, Tensor k_end, int block_size, "
    "int group, float? scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_backward,
)


class Statics(NamedTuple):
    block_size: int  # at most ``lists.STEP``
    group: int  # heads that share a selection
    scale: float | None
    softcap: float


def plan_of(
    statics: Statics, kernel: str, q: Tensor, k: Tensor, v: Tensor, selection: tuple[Tensor, Tensor | None]
) -> ListPlan:
    """Of the selected blocks [B, T, H / group, n] and which of them are valid."""
    blocks, part = num_blocks(k.shape[1], statics.block_size), part_of(kernel, statics.group)
    return ListPlan(*_plan_op(*selection, blocks, row_bytes(q, v, statics.group), part))


def _forward(statics: Statics, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *tensors: Tensor) -> Forward:
    """``tensors``: a ``ListPlan`` and each query's interval of keys, one by one."""
    return forward_by_log2(*_forward_op(q, k, v, *tensors, *statics), sink, *tensors)


def backward(statics: Statics, given: Backward) -> Gradients:
    tensors = (given.q, given.k, given.v, given.out, *given.saved)
    d_q, d_k, d_v, delta = _backward_op(given.d_out, given.d_lse, *tensors, *statics)
    return Gradients(d_q, d_k, d_v, sink_gradient_by_log2(given, delta))


PASSES = Passes("the triton backend of block_sparse_attention", _forward, backward)


def attend_by_lists(
    statics: Statics,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    selection: tuple[Tensor, Tensor | None],
    bounds: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        plan = plan_of(statics, "forward", q, k, v, selection)
    return attend(PASSES, statics, q, k, v, sink, *plan, *bounds)
