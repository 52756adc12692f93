"""The registered ops of calls that read blocks for a tile where its queries share them, and by lists where they do not.

Which blocks a tile shares, the plan finds on the device: nobody waits.  The kernel that goes by unions begins the
outputs, and the merge of the lists' partial results adds to them.  The backward pass goes by lists alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.sparse.block_sparse_attention import geometry, lists, torch_op_lists
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Cut
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan
from kernel_index.kernels.sparse.block_sparse_attention.plan import Plan, allocate_plan


def _plan(selected, selected_valid, block_size, keys, tile, row_bytes, part):
    """A ``Plan`` without ``pairs``, of shared blocks, and the ``ListPlan`` of the others."""
    from kernel_index.kernels.sparse.block_sparse_attention import triton_plan

    *of_unions, others = triton_plan.shared_plan(selected, selected_valid, -(-keys // block_size), tile)
    finer, others, list_size = lists.split(selected, others, block_size)
    return *of_unions, *triton_plan.list_plan(finer, others, -(-keys // list_size), row_bytes, part)


def _allocate_plan(selected, selected_valid, block_size, keys, tile, row_bytes, part):
    finer, valid, list_size = lists.split(selected, selected_valid, block_size)
    of_lists = lists.allocate_list_plan(finer, valid, -(-keys // list_size), row_bytes, part)
    return *allocate_plan(selected, tile)[:3], *of_lists


def _allocate(q, k, v, blocks, members, sizes, order, items, parts, k_start, k_end, block_size, cut, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _launch(q, k, v, blocks, members, sizes, order, items, parts, k_start, k_end, block_size, cut, scale, softcap):
    from kernel_index.kernels.sparse.block_sparse_attention import triton, triton_lists

    outputs = _allocate(
        q, k, v, blocks, members, sizes, order, items, parts, k_start, k_end, block_size, cut, scale, softcap
    )
    q, k, v = map(dense_heads, (q, k, v))
    cut, bounds = Cut(*cut), (k_start, k_end)
    how = geometry.launch_of("forward", q, k, v, block_size, cut, scale, softcap)
    triton.forward(q, k, v, Plan(blocks, members, sizes, blocks), bounds, how, outputs)
    how = lists.launch_of("forward", q, k, v, min(block_size, lists.STEP), cut.group, scale, softcap)
    plan = ListPlan(order, items, parts)
    return triton_lists.forward(q, k, v, plan, bounds, how, outputs, begun=True)


_plan_op = ops.register(
    "block_sparse_mixed_plan(Tensor selected, Tensor? selected_valid, int block_size, SymInt keys, int tile, "
    "int row_bytes, int part) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _plan,
    _allocate_plan,
)
_forward_op = ops.register(
    "block_sparse_mixed(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor members, Tensor sizes, Tensor order, "
    "Tensor items, Tensor parts, Tensor k_start, Tensor k_end, int block_size, int[] cut, float? scale, "
    "float softcap) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)


class _Statics(NamedTuple):
    block_size: int
    cut: list[int]
    scale: float | None
    softcap: float


def _forward(statics: _Statics, q: Tensor, k: Tensor, v: Tensor, sink: None, *tensors: Tensor | None) -> Forward:
    """``tensors``: the selection, what of it is valid, and each query's interval of keys."""
    selected, valid, *bounds = tensors
    block_size, cut = statics.block_size, Cut(*statics.cut)
    row_bytes, part = lists.row_bytes(q, v, cut.group), lists.part_of("forward", cut.group)
    plan = _plan_op(selected, valid, block_size, k.shape[1], cut.queries, row_bytes, part)
    out, log2_sum = _forward_op(q, k, v, *plan, *bounds, *statics)
    return torch_op_lists.forward_of(out, log2_sum, *tensors)


def _backward(statics: _Statics, given: Backward) -> Gradients:
    log2_sum, selected, valid, *bounds = given.saved
    selected, valid, block_size = lists.split(selected, valid, statics.block_size)
    scoring = torch_op_lists.Statics(block_size, Cut(*statics.cut).group, statics.scale, statics.softcap)
    plan = torch_op_lists.plan_of(scoring, "backward", given.q, given.k, given.v, (selected, valid))
    return torch_op_lists.backward(scoring, given._replace(saved=(log2_sum, *plan, *bounds)))


PASSES = Passes("the triton backend of block_sparse_attention", _forward, _backward)


def attend_by_both(
    statics: tuple[int, Cut, float | None, float],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: tuple[Tensor, Tensor | None],
    bounds: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """``statics``: block size, cut, scale and softcap."""
    block_size, cut, scale, softcap = statics
    return attend(PASSES, _Statics(block_size, list(cut), scale, softcap), q, k, v, None, *selection, *bounds)
