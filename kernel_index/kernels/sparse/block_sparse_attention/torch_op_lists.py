"""The registered ops of the kernels that go by lists of queries, and their two passes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan, allocate_list_plan, launch_of, list_plan


def _allocate(q, k, v, order, items, parts, k_start, k_end, block_size, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _launch(q, k, v, order, items, parts, k_start, k_end, block_size, scale, softcap):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_lists

    outputs = _allocate(q, k, v, order, items, parts, k_start, k_end, block_size, scale, softcap)
    q, k, v = map(dense_heads, (q, k, v))
    how = launch_of("forward", q, k, v, block_size, scale, softcap)
    return triton_lists.forward(q, k, v, ListPlan(order, items, parts), (k_start, k_end), how, outputs)


def _allocate_backward(
    d_out, d_lse, q, k, v, out, log2_sum, order, items, parts, k_start, k_end, block_size, scale, softcap
):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _launch_backward(
    d_out, d_lse, q, k, v, out, log2_sum, order, items, parts, k_start, k_end, block_size, scale, softcap
):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_lists_backward

    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    d_out, q, k, v = map(dense_heads, (d_out, q, k, v))
    how = launch_of("backward", q, k, v, block_size, scale, softcap)
    plan, bounds = ListPlan(order, items, parts), (k_start, k_end)
    triton_lists_backward.backward(d_out, d_lse, q, k, v, out, log2_sum, plan, bounds, how, (d_q, d_k, d_v))
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


_plan_op = ops.register(
    "block_sparse_list_plan(Tensor selected, Tensor? selected_valid, SymInt num_blocks) -> (Tensor, Tensor, Tensor)",
    list_plan,
    allocate_list_plan,
)
_forward_op = ops.register(
    "block_sparse_lists(Tensor q, Tensor k, Tensor v, Tensor order, Tensor items, Tensor parts, Tensor k_start, "
    "Tensor k_end, int block_size, float? scale, float softcap) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "block_sparse_lists_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor order, Tensor items, Tensor parts, Tensor k_start, Tensor k_end, int block_size, "
    "float? scale, float softcap) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_backward,
)


class Statics(NamedTuple):
    block_size: int  # at most ``lists.STEP``
    scale: float | None
    softcap: float


def _forward(statics: Statics, q: Tensor, k: Tensor, v: Tensor, sink: None, *tensors: Tensor) -> Forward:
    """``tensors``: a ``ListPlan`` and each query's interval of keys, one by one."""
    out, log2_sum = _forward_op(q, k, v, *tensors, *statics)
    return Forward(out, (log2_sum * math.log(2)).transpose(1, 2).contiguous(), (log2_sum, *tensors))


def _backward(statics: Statics, given: Backward) -> Gradients:
    tensors = (given.q, given.k, given.v, given.out, *given.saved)
    return Gradients(*_backward_op(given.d_out, given.d_lse, *tensors, *statics))


PASSES = Passes("the triton backend of block_sparse_attention", _forward, _backward)


def attend_by_lists(
    statics: Statics,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    selected_valid: Tensor | None,
    num_blocks: int,
    bounds: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """``selected`` [B, T, H, n]."""
    with torch.no_grad():
        plan = _plan_op(selected, selected_valid, num_blocks)
    return attend(PASSES, statics, q, k, v, None, *plan, *bounds)
