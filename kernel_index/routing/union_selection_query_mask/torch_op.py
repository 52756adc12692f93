"""The registered op of the ``triton`` backend."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton.launch import dense
from kernel_index.routing.union_selection_query_mask.contract import UnionCall
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps


def _allocate(selected: Tensor, valid: Tensor | None, tile: int, num_blocks: int) -> tuple[Tensor, ...]:
    batch, queries, groups, count = selected.shape
    lists = (batch, -(-queries // tile), groups)
    union = selected.new_empty((*lists, min(tile * count, num_blocks)), dtype=torch.int32)
    sizes, own = (selected.new_empty(shape, dtype=torch.int32) for shape in (lists, selected.shape))
    return union, sizes, own, selected.new_empty(selected.shape, dtype=torch.bool)


def _launch(selected: Tensor, valid: Tensor | None, tile: int, num_blocks: int) -> tuple[Tensor, ...]:
    from kernel_index.routing.union_selection_query_mask import triton

    union, sizes, own, is_selected = _allocate(selected, valid, tile, num_blocks)
    if selected.numel() == 0:
        return union.fill_(-1), sizes.zero_(), own, is_selected
    selected, valid = dense((selected, valid))
    triton.fill(selected, valid, tile, num_blocks, (union, sizes, own, is_selected))
    return union, sizes, own, is_selected


_op = ops.register(
    "union_selection(Tensor selected, Tensor? valid, int tile, SymInt num_blocks) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _allocate,
)


def union_triton(call: UnionCall) -> UnionMaps:
    return UnionMaps(*_op(call.selected, call.selected_valid, call.query_tile_size, call.num_blocks))
