"""The registered op of the ``triton`` backend."""

import torch

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.routing.forced_blocks import forced_blocks
from kernel_index.routing.hierarchical_block_expansion.contract import HierarchyCall
from kernel_index.routing.legal_blocks import TopBlocks, legal_blocks


def _allocate(q, block_keys, first, current, forced, ratio, topc, exhaustive, topk):
    return torch.empty((*q.shape[:2], block_keys.shape[2], topk), dtype=torch.int32, device=q.device)


def _launch(q, block_keys, first, current, forced, ratio, topc, exhaustive, topk):
    from kernel_index.routing.hierarchical_block_expansion import triton

    indices = _allocate(q, block_keys, first, current, forced, ratio, topc, exhaustive, topk)
    q, block_keys = map(launch.dense_heads, (q, block_keys))
    sight = (first.contiguous(), current.contiguous(), forced.to(torch.int32).contiguous())
    return triton.select(q, block_keys, sight, (ratio, topc, exhaustive), indices)


_select_op = ops.register(
    "select_in_hierarchy(Tensor q, Tensor block_keys, Tensor first, Tensor current, Tensor forced, SymInt ratio, "
    "SymInt topc, bool exhaustive, SymInt topk) -> Tensor",
    _launch,
    _allocate,
)


def select_triton(call: HierarchyCall) -> TopBlocks:
    with torch.no_grad():
        plan, keys = call.plan, call.block_keys.detach()
        legal = legal_blocks(call.mask, call.sizes, call.block_size)
        forced = forced_blocks(legal, keys.shape[1], plan.forced)[..., : call.topk]
        options = (plan.coarse_ratio, plan.coarse_topc, plan.exhaustive, call.topk)
        indices = _select_op(call.q.detach(), keys, *legal, forced, *options)
        return TopBlocks(indices, indices >= 0)
