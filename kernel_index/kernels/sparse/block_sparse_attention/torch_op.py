"""The registered ops of the ``triton`` backend, and its two passes."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import device_documents, ops
from kernel_index.core.attention_function import (
    Backward,
    Forward,
    Gradients,
    Passes,
    attend,
    forward_by_log2,
    sink_gradient_by_log2,
)
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.block_sparse_attention import lists, torch_op_lists, torch_op_mixed
from kernel_index.kernels.sparse.block_sparse_attention.contract import BlockSparseCall
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Cut, cut_of, launch_of
from kernel_index.kernels.sparse.block_sparse_attention.plan import KeyPlan, Plan, allocate_plan, forward_plan, key_plan
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.masks.doc_window_mask.lowerings import KernelIntervals


def _allocate_plan(selected, selected_valid, num_blocks, tile):
    return allocate_plan(selected, tile)


def _allocate_key_plan(pairs, tile, q_start, q_end, queries, block_size):
    blocks = launch.ceil_div(q_start.shape[1], block_size)
    return pairs.new_empty(pairs.numel()), pairs.new_empty((*pairs.shape[:2], blocks, 4), dtype=torch.int64)


def _allocate(q, k, v, blocks, members, sizes, k_start, k_end, block_size, cut, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _launch(q, k, v, blocks, members, sizes, k_start, k_end, block_size, cut, scale, softcap):
    from kernel_index.kernels.sparse.block_sparse_attention import triton

    outputs = _allocate(q, k, v, blocks, members, sizes, k_start, k_end, block_size, cut, scale, softcap)
    q, k, v = map(launch.dense_heads, (q, k, v))
    plan, bounds = Plan(blocks, members, sizes, blocks), (k_start, k_end)
    how = launch_of("forward", q, k, v, block_size, Cut(*cut), scale, softcap)
    return triton.forward(q, k, v, plan, bounds, how, outputs)


def _allocate_queries(
    d_out, d_lse, q, k, v, out, log2_sum, blocks, members, sizes, k_start, k_end, block_size, cut, scale, softcap
):
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return d_q, torch.empty(log2_sum.shape, dtype=torch.float32, device=q.device)


def _launch_queries(
    d_out, d_lse, q, k, v, out, log2_sum, blocks, members, sizes, k_start, k_end, block_size, cut, scale, softcap
):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_backward

    outputs = _allocate_queries(
        d_out, d_lse, q, k, v, out, log2_sum, blocks, members, sizes, k_start, k_end, block_size, cut, scale, softcap
    )
    d_out, q, k, v = map(launch.dense_heads, (d_out, q, k, v))
    plan, bounds = Plan(blocks, members, sizes, blocks), (k_start, k_end)
    how = launch_of("queries", q, k, v, block_size, Cut(*cut), scale, softcap)
    return triton_backward.backward_queries(d_out, d_lse, q, k, v, out, log2_sum, plan, bounds, how, outputs)


def _allocate_keys(d_out, q, k, v, log2_sum, delta, lists, bounds, q_start, q_end, block_size, cut, scale, softcap):
    return torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _launch_keys(d_out, q, k, v, log2_sum, delta, lists, bounds, q_start, q_end, block_size, cut, scale, softcap):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_backward

    outputs = _allocate_keys(
        d_out, q, k, v, log2_sum, delta, lists, bounds, q_start, q_end, block_size, cut, scale, softcap
    )
    d_out, q, k, v = map(launch.dense_heads, (d_out, q, k, v))
    how = launch_of("keys", q, k, v, block_size, Cut(*cut), scale, softcap)
    plan, seen = KeyPlan(lists, bounds), (q_start, q_end)
    return triton_backward.backward_keys(d_out, q, k, v, log2_sum, delta, plan, seen, how, outputs)


_plan_op = ops.register(
    "block_sparse_plan(Tensor selected, Tensor? selected_valid, SymInt num_blocks, int tile) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    forward_plan,
    _allocate_plan,
)
_key_plan_op = ops.register(
    "block_sparse_key_plan(Tensor pairs, int tile, Tensor q_start, Tensor q_end, SymInt queries, int block_size) -> "
    "(Tensor, Tensor)",
    key_plan,
    _allocate_key_plan,
)
_forward_op = ops.register(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor members, Tensor sizes, Tensor k_start, "
    "Tensor k_end, int block_size, int[] cut, float? scale, float softcap) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_queries_op = ops.register(
    "block_sparse_attention_backward_queries(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor blocks, Tensor members, Tensor sizes, Tensor k_start, Tensor k_end, int block_size, "
    "int[] cut, float? scale, float softcap) -> (Tensor, Tensor)",
    _launch_queries,
    _allocate_queries,
)
_keys_op = ops.register(
    "block_sparse_attention_backward_keys(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor log2_sum, Tensor delta, "
    "Tensor lists, Tensor bounds, Tensor q_start, Tensor q_end, int block_size, int[] cut, float? scale, "
    "float softcap) -> (Tensor, Tensor)",
    _launch_keys,
    _allocate_keys,
)


class _Statics(NamedTuple):
    block_size: int
    cut: list[int]
    scale: float | None
    softcap: float


def _forward(statics: _Statics, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *tensors: Tensor) -> Forward:
    """``tensors``: a ``Plan`` and ``KernelIntervals``, one by one."""
    plan, bounds = Plan(*tensors[:4]), KernelIntervals(*tensors[4:])
    out, log2_sum = _forward_op(q, k, v, *plan[:3], *bounds[:2], *statics)
    return forward_by_log2(out, log2_sum, sink, *tensors)


def _backward(statics: _Statics, given: Backward) -> Gradients:
    q, k, v = given.q, given.k, given.v
    log2_sum, *tensors = given.saved
    plan, bounds = Plan(*tensors[:4]), KernelIntervals(*tensors[4:])
    saved = (q, k, v, given.out, log2_sum)
    d_q, delta = _queries_op(given.d_out, given.d_lse, *saved, *plan[:3], *bounds[:2], *statics)
    d_k = d_v = None
    if given.needs[1] or given.needs[2]:
        lists = _key_plan_op(plan.pairs, statics.cut[0], *bounds[2:], q.shape[1], statics.block_size)
        d_k, d_v = _keys_op(given.d_out, q, k, v, log2_sum, delta, *lists, *bounds[2:], *statics)
    return Gradients(d_q, d_k, d_v, sink_gradient_by_log2(given, delta))


PASSES = Passes("the triton backend of block_sparse_attention", _forward, _backward)


def block_sparse_triton(call: BlockSparseCall) -> tuple[Tensor, Tensor]:
    """``call.maps`` are of another tile size than the kernels' and are not used."""
    q, k, v, selected, selected_valid, block_size = call[:6]
    if is_invariant():
        own = selected if selected_valid is None else torch.where(selected_valid, selected, -1)
        scoring = device_documents.Scoring(scale_of(q, call.scale), call.softcap, block_size)
        return device_documents.attend_to_mask(q, k, v, call.sink, call.mask, call.sizes, scoring, own)
    if selected.shape[3] == 0:
        selected, selected_valid = selected.new_full((*selected.shape[:3], 1), -1), None
    cut = cut_of(q.shape[2] // selected.shape[2], q.element_size(), call.query_tile_size)
    blocks, bounds = call.blocks, call.mask.row_kernel_intervals(call.sizes)
    head_bytes = lists.head_bytes_of(q, v)
    if lists.use_lists(cut, head_bytes, block_size, blocks, selected.shape[3]):
        selected, selected_valid, block_size = lists.split(selected, selected_valid, block_size)
        scoring = torch_op_lists.Statics(block_size, cut.group, call.scale, call.softcap)
        return torch_op_lists.attend_by_lists(scoring, q, k, v, call.sink, (selected, selected_valid), bounds[:2])
    if lists.use_both(cut, call, block_size):
        scoring = (block_size, cut, call.scale, call.softcap)
        return torch_op_mixed.attend_by_both(scoring, q, k, v, call.sink, (selected, selected_valid), bounds[:2])
    with torch.no_grad():
        plan = _plan_op(selected, selected_valid, blocks, cut.queries)
    statics = _Statics(block_size, list(cut), call.scale, call.softcap)
    return attend(PASSES, statics, q, k, v, call.sink, *plan, *bounds)
