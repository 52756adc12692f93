"""The exhaustive router of a GPU: means of blocks scored and the best ones kept in one launch."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.block_router.scores import means_and_legal
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks


def _allocate(q, means, first, current, groups, topk):
    return torch.empty((*q.shape[:2], groups, topk), dtype=torch.int32, device=q.device)


def _launch(q, means, first, current, groups, topk):
    from kernel_index.routing.block_router import triton

    indices = _allocate(q, means, first, current, groups, topk)
    q, means = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, means))
    first, current = launch.dense((first, current))
    return triton.route(q, means, first, current, groups, indices)


_route_op = ops.register(
    "route_blocks(Tensor q, Tensor means, Tensor first, Tensor current, int groups, SymInt topk) -> Tensor",
    _launch,
    _allocate,
)


def route_triton(call: RouterCall) -> TopBlocks:
    means, legal = means_and_legal(call)
    return triton_top_blocks(call.q, means, legal, call.selected, call.groups)


def triton_top_blocks(q: Tensor, means: Tensor, legal: LegalBlocks, topk: int, groups: int) -> TopBlocks:
    """``top_blocks`` of every query's scores, of which none is ever stored.

    Args:
        q: [B, T, H, D]; the heads of a group share a selection, by the mean of their queries.
        means: [B, blocks, K, D] of ``block_means``.
        legal: of the T queries.
        topk: blocks of a query, the current one counted.
        groups: G, a multiple of K and a divisor of H.

    Returns:
        ``TopBlocks`` of [B, T, G, topk].
    """
    with torch.no_grad():
        indices = _route_op(q.detach(), means, *legal, groups, topk)
        return TopBlocks(indices, indices >= 0)
