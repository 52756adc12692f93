"""Block-sparse attention on the CPU in C++: by key block, as ``cpu``, with scores that never leave a core's cache.

Queries are split into chunks whose float32 sums fit the L2 cache.  A chunk sorts its selected blocks and visits them
one by one: it gathers up to 64 rows, multiplies them with the block's keys, forms weights by an online softmax,
multiplies these with the block's values, and adds the products to the rows' sums.  No other plan is made or kept.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.core.attention_function import (
    Backward,
    Forward,
    Gradients,
    Passes,
    add_sink,
    attend,
    delta_of,
    gradient_of_sink,
)
from kernel_index.core.document_attention import Bounds, Scoring, attend_to_documents
from kernel_index.core.excluded import Sight, guarded, guarded_backward, sight_of_blocks
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.sparse.block_sparse_attention.contract import BlockSparseCall
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.masks.doc_window_mask.intervals import Intervals

SOURCE = Path(__file__).with_name("block_sparse.cpp")


class _Plan(NamedTuple):
    selected: Tensor  # int32 [B, T, G, n], −1 for none
    bounds: Intervals
    block_size: int
    scoring: tuple[float, float]  # scale and softcap

    def sight(self) -> Sight:
        return sight_of_blocks(self.selected, None, self.block_size, *self.bounds)


def _forward(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Forward:
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, rows = q.new_empty(*q.shape[:3], v.shape[3]), (q.shape[0], q.shape[2], q.shape[1])
    lse, row_max, inv_row_sum = (q.new_empty(rows, dtype=torch.float32) for _ in range(3))
    _call("forward", (q, k, v), plan, q, k, v, out, lse, row_max, inv_row_sum)
    if sink is not None:
        lse, share = add_sink(out, lse, sink)
        inv_row_sum *= share
    return Forward(out, lse, (row_max, inv_row_sum, None if sink is None else lse))


def _backward(plan: _Plan, given: Backward) -> Gradients:
    return guarded_backward(functools.partial(_run_backward, plan), plan.sight, given)


def _run_backward(plan: _Plan, given: Backward) -> Gradients:
    q, k, v = (x.contiguous() for x in (given.q, given.k, given.v))
    row_max, inv_row_sum, lse = given.saved
    delta_BHT = delta_of(given)
    delta = delta_BHT.transpose(1, 2).contiguous()
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    _call("backward", (q, k, v), plan, given.d_out.contiguous(), q, k, v, row_max, inv_row_sum, delta, d_q, d_k, d_v)
    return Gradients(d_q, d_k, d_v, gradient_of_sink(given, lse, delta_BHT))


PASSES = Passes("the native backend of block_sparse_attention", _forward, _backward)


def _call(which: str, qkv: tuple[Tensor, Tensor, Tensor], plan: _Plan, *tensors: Tensor) -> None:
    q, k, v = qkv
    (batch, queries, heads, width), (keys, kv_heads) = q.shape, k.shape[1:3]
    groups, count = plan.selected.shape[2:]
    block_size = min(plan.block_size, max(keys, 1))  # one block that holds all is as long as they are
    sizes = (batch, queries, keys, heads, kv_heads, groups, width, v.shape[3], count, block_size)
    sizes = (*sizes, plan.bounds.start.shape[0], torch.get_num_threads())
    function = f"block_sparse_{which}_{native.suffix(q.dtype)}"
    native.call(SOURCE, function, sizes, plan.scoring, plan.selected, *plan.bounds, *tensors)


@guarded
def block_sparse_native(call: BlockSparseCall) -> tuple[Tensor, Tensor]:
    selected = call.selected
    if call.selected_valid is not None:
        selected = torch.where(call.selected_valid, selected, -1)
    if is_invariant():
        scoring = Scoring(scale_of(call.q, call.scale), call.softcap, call.block_size)
        sight = Bounds(*call.mask.row_intervals(call.sizes), call.mask.row_origins(call.sizes))
        return attend_to_documents(call.q, call.k, call.v, call.sink, sight, scoring, selected.to(torch.int32))
    bounds = Intervals(*(x.to(torch.int32).contiguous() for x in call.mask.row_intervals(call.sizes)))
    plan_scoring = (scale_of(call.q, call.scale), call.softcap)
    plan = _Plan(selected.to(torch.int32).contiguous(), bounds, call.block_size, plan_scoring)
    return attend(PASSES, plan, call.q, call.k, call.v, call.sink)
