"""The registered ops of calls in which tiles of queries go by their unions or by lists, each as it selects.

The plan decides on the device for each tile, so the host does not wait.  Kernels of one way skip the tiles of the
other; a way without tiles still costs its launches.  Backward, tiles that go by unions take dQ from their union, and dK
and dV from lists of their own, which compute nothing that was not selected.
"""

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
from kernel_index.kernels.sparse.block_sparse_attention import geometry, lists
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Cut
from kernel_index.kernels.sparse.block_sparse_attention.plan import Plan, allocate_plan


def _plan(selected, selected_valid, block_size, keys, tile, row_bytes):
    """A ``Plan`` without ``pairs``; the order and begins of lists: of tiles that go by lists, then of the others."""
    from kernel_index.kernels.sparse.block_sparse_attention import triton_plan

    of_unions = triton_plan.unions_plan(selected, selected_valid, -(-keys // block_size), tile)
    finer, valid, list_size = lists.split(selected, selected_valid, block_size)
    return *of_unions, *triton_plan.inverted(finer, valid, -(-keys // list_size), row_bytes, (of_unions[2], tile))


def _allocate_plan(selected, selected_valid, block_size, keys, tile, row_bytes):
    finer, _, list_size = lists.split(selected, selected_valid, block_size)
    return *allocate_plan(selected, tile)[:3], *lists.allocate_inverted(finer, -(-keys // list_size), row_bytes, True)


def _allocate(q, k, v, blocks, members, sizes, order, begins, k_start, k_end, block_size, cut, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _launch(q, k, v, blocks, members, sizes, order, begins, k_start, k_end, block_size, cut, scale, softcap):
    from kernel_index.kernels.sparse.block_sparse_attention import triton, triton_lists

    outputs = _allocate(q, k, v, blocks, members, sizes, order, begins, k_start, k_end, block_size, cut, scale, softcap)
    q, k, v = map(dense_heads, (q, k, v))
    cut, bounds, list_size = Cut(*cut), (k_start, k_end), min(block_size, lists.STEP)
    of_unions, how = Plan(blocks, members, sizes, blocks), _how("forward", q, k, v, list_size, cut, scale, softcap)
    bad = None
    if lists.hopper_unions(cut, q, v, block_size):
        from kernel_index.kernels.sparse.block_sparse_attention import triton_hopper_unions

        bad = triton_lists.unfit_blocks(k, v, -(-k.shape[1] // list_size), how.constants)
        triton_hopper_unions.forward(q, k, v, of_unions, bounds, bad, how, outputs)
    else:
        tiles = geometry.launch_of("forward", q, k, v, block_size, cut, scale, softcap)
        triton.forward(q, k, v, of_unions, bounds, tiles, outputs)
    by_lists = next(_list_plans("forward", q, k, v, (order, begins), list_size, cut))
    of_tiles = sizes, lists.tile_of(cut, q, v, block_size)
    return triton_lists.forward(q, k, v, by_lists, bounds, how, outputs, of_tiles, bad)


def _how(kernel, q, k, v, list_size, cut, scale, softcap):
    return lists.launch_of(kernel, q, k, v, list_size, cut.group, scale, softcap)


def _list_plans(kernel, q, k, v, found, list_size, cut):
    """Of the tiles that go by lists, and of the others."""
    from kernel_index.kernels.sparse.block_sparse_attention import triton_plan

    segments = lists.segments_of(q, v, found[0].numel(), cut.group)
    for first in (0, segments.segments):
        part, blocks = lists.part_of(kernel, cut.group), -(-k.shape[1] // list_size)
        yield triton_plan.with_parts(found, (first, segments.segments), blocks, segments.entries, part)


def _allocate_backward(
    d_out, d_lse, q, k, v, out, log2_sum, blocks, members, sizes, order, begins, k_start, k_end, block_size, cut, scale,
    softcap,
):  # fmt: skip
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), torch.empty_like(log2_sum)


def _launch_backward(
    d_out, d_lse, q, k, v, out, log2_sum, blocks, members, sizes, order, begins, k_start, k_end, block_size, cut, scale,
    softcap,
):  # fmt: skip
    from kernel_index.kernels.sparse.block_sparse_attention import triton_backward, triton_lists_backward

    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    d_out, q, k, v = map(dense_heads, (d_out, q, k, v))
    cut, bounds, list_size = Cut(*cut), (k_start, k_end), min(block_size, lists.STEP)
    of_unions, how = Plan(blocks, members, sizes, blocks), _how("backward", q, k, v, list_size, cut, scale, softcap)
    bad = None
    if lists.hopper_unions(cut, q, v, block_size):
        from kernel_index.kernels.sparse.block_sparse_attention import triton_hopper_unions, triton_lists

        delta = triton_lists_backward.delta_of(d_out, d_lse, out, how)
        bad = triton_lists.unfit_blocks(k, v, -(-k.shape[1] // list_size), how.constants)
        triton_hopper_unions.backward_queries((d_out, log2_sum, delta), q, k, v, of_unions, bounds, bad, how, d_q)
    else:
        tiles, delta = (
            geometry.launch_of("queries", q, k, v, block_size, cut, scale, softcap),
            torch.empty_like(log2_sum),
        )
        saved = q, k, v, out, log2_sum
        triton_backward.backward_queries(d_out, d_lse, *saved, of_unions, bounds, tiles, (d_q, delta))
    by_lists, by_unions = _list_plans("backward", q, k, v, (order, begins), list_size, cut)
    of_rows, of_tiles = (d_out, log2_sum, delta), (sizes, lists.tile_of(cut, q, v, block_size))
    triton_lists_backward.backward(of_rows, q, k, v, by_lists, bounds, how, (d_q, d_k, d_v), of_tiles, bad)
    triton_lists_backward.backward(of_rows, q, k, v, by_unions, bounds, how, (None, d_k, d_v), bad=bad)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), delta


_plan_op = ops.register(
    "block_sparse_mixed_plan(Tensor selected, Tensor? selected_valid, int block_size, SymInt keys, int tile, "
    "int row_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _plan,
    _allocate_plan,
)
_forward_op = ops.register(
    "block_sparse_mixed(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor members, Tensor sizes, Tensor order, "
    "Tensor begins, Tensor k_start, Tensor k_end, int block_size, int[] cut, float? scale, float softcap) -> "
    "(Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "block_sparse_mixed_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor blocks, Tensor members, Tensor sizes, Tensor order, Tensor begins, Tensor k_start, "
    "Tensor k_end, int block_size, int[] cut, float? scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_backward,
)


class _Statics(NamedTuple):
    block_size: int
    cut: list[int]
    scale: float | None
    softcap: float


def _forward(statics: _Statics, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *tensors: Tensor) -> Forward:
    """``tensors``: a plan, and each query's interval of keys, one by one."""
    return forward_by_log2(*_forward_op(q, k, v, *tensors, *statics), sink, *tensors)


def _backward(statics: _Statics, given: Backward) -> Gradients:
    tensors = (given.q, given.k, given.v, given.out, *given.saved)
    d_q, d_k, d_v, delta = _backward_op(given.d_out, given.d_lse, *tensors, *statics)
    return Gradients(d_q, d_k, d_v, sink_gradient_by_log2(given, delta))


PASSES = Passes("the triton backend of block_sparse_attention", _forward, _backward)


def attend_by_both(
    statics: tuple[int, Cut, float | None, float],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    selection: tuple[Tensor, Tensor | None],
    bounds: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """``statics``: block size, cut, scale and softcap."""
    block_size, cut, scale, softcap = statics
    with torch.no_grad():
        tile = lists.tile_of(cut, q, v, block_size)
        plan = _plan_op(*selection, block_size, k.shape[1], tile, lists.row_bytes(q, v, cut.group))
    return attend(PASSES, _Statics(block_size, list(cut), scale, softcap), q, k, v, sink, *plan, *bounds)
