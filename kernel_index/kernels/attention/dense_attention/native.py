"""Attention on the CPU in C++: a tile of scores never leaves a core's cache, and only keys that a query sees are read.

A tile is 64 queries of one head; it takes the keys of its intervals in blocks of 128, with an online softmax between
the two products.  Under ``numerics("invariant")`` its tiles and blocks begin at each document: ``document_attention``.
Backward recomputes the weights from each row's maximum and sum, and makes five products for each
tile.  Key and value gradients are summed in a fixed number of lanes: results do not depend on the number of threads.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend, delta_of, sink_gradient
from kernel_index.core.document_attention import Bounds, Scoring, attend_to_documents
from kernel_index.core.excluded import guarded, guarded_backward
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse, sight_of
from kernel_index.kernels.attention.dense_attention.tree_paths import attend_to_paths
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE, scale_of
from kernel_index.masks.doc_window_mask.intervals import RowBounds

SOURCE = Path(__file__).with_name("attention.cpp")


class _Plan(NamedTuple):
    bounds: RowBounds  # each query's interval of keys, int32 [B or 1, T], and in a tree the end of each key's queries
    scoring: tuple[float, float]  # scale and softcap


def _forward(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Forward:
    q, k, v = (x.contiguous() for x in (q, k, v))
    (batch, queries, heads, _), single = q.shape, q.new_empty(0, dtype=torch.float32)
    sink_logits = single.new_full((heads,), -torch.inf) if sink is None else native.floats(sink.detach())
    out = q.new_empty(batch, queries, heads, v.shape[3])
    lse, row_max, inv_row_sum = (single.new_empty(batch, heads, queries) for _ in range(3))
    _call("forward", (q, k, v), plan, q, k, v, sink_logits, out, lse, row_max, inv_row_sum)
    return Forward(out, lse, (row_max, inv_row_sum))


def _backward(plan: _Plan, given: Backward) -> Gradients:
    return guarded_backward(functools.partial(_run_backward, plan), lambda: sight_of(plan.bounds), given)


def _run_backward(plan: _Plan, given: Backward) -> Gradients:
    q, k, v = (x.contiguous() for x in (given.q, given.k, given.v))
    row_max, inv_row_sum = given.saved
    delta = delta_of(given).contiguous()
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    d_out = given.d_out.contiguous()
    _call("backward", (q, k, v), plan, d_out, q, k, v, row_max, inv_row_sum, delta, d_q, d_k, d_v)
    d_sink = None
    if given.sink is not None and given.needs[3]:
        weight = torch.exp(given.sink.to(torch.float32)[:, None] - row_max) * inv_row_sum
        d_sink = sink_gradient(given, weight, delta)
    return Gradients(d_q, d_k, d_v, d_sink)


PASSES = Passes("the native backend of attention", _forward, _backward)


def _call(which: str, qkv: tuple[Tensor, Tensor, Tensor], plan: _Plan, *tensors: Tensor) -> None:
    q, k, v = qkv
    start, end, q_end = plan.bounds
    q_end = start.new_empty(0) if q_end is None else q_end  # its address is null
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], v.shape[3], start.shape[0])
    function = f"attention_{which}_{native.suffix(q.dtype)}"
    native.call(SOURCE, function, (*sizes, torch.get_num_threads()), plan.scoring, start, end, q_end, *tensors)


@guarded
def attention_native(call: AttentionCall) -> OutAndLse:
    scoring = scale_of(call.q, call.scale), call.softcap
    if is_invariant():
        documents = Scoring(*scoring)
        if call.mask.is_tree and not call.is_empty:
            return attend_to_paths(call, documents)
        mask = EVERYTHING_BEFORE if call.is_empty else call.mask  # of nothing any mask leaves the same
        bounds = Bounds(*mask.row_intervals(call.sizes), mask.row_origins(call.sizes))
        return attend_to_documents(call.q, call.k, call.v, call.sink, bounds, documents)
    plan = _Plan(call.mask.row_bounds(call.sizes).each(torch.Tensor.contiguous), scoring)
    return attend(PASSES, plan, call.q, call.k, call.v, call.sink)
