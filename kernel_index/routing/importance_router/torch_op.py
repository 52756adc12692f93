"""The registered op of the ``triton`` backend."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.routing.importance_router.contract import ImportanceCall
from kernel_index.routing.legal_blocks import TopBlocks


def _allocate(q, block_keys, lse, first, current, forced, scale, topk):
    return torch.empty((*q.shape[:2], block_keys.shape[2], topk), dtype=torch.int32, device=q.device)


def _launch(q, block_keys, lse, first, current, forced, scale, topk):
    from kernel_index.routing.importance_router import triton

    indices = _allocate(q, block_keys, lse, first, current, forced, scale, topk)
    q, block_keys = map(launch.dense_heads, (q, block_keys))
    lse, first, current, forced = launch.dense((lse.to(torch.float32), first, current, forced.to(torch.int32)))
    return triton.route(q, block_keys, lse, (first, current, forced), scale, indices)


_route_op = ops.register(
    "route_by_importance(Tensor q, Tensor block_keys, Tensor lse, Tensor first, Tensor current, Tensor forced, "
    "float scale, SymInt topk) -> Tensor",
    _launch,
    _allocate,
)


def route_triton(call: ImportanceCall) -> TopBlocks:
    with torch.no_grad():
        legal, forced = call.legal_and_forced()
        tensors: tuple[Tensor, ...] = (call.q.detach(), call.block_keys.detach(), call.lse.detach(), *legal, forced)
        indices = _route_op(*tensors, call.scale, call.selected)
        return TopBlocks(indices, indices >= 0)
