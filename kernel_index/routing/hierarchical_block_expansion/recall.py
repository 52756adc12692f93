"""How much of the exhaustive selection a two-step selection finds."""

from collections.abc import Callable

import torch

from kernel_index.routing.hierarchical_block_expansion.contract import HierarchyCall
from kernel_index.routing.hierarchical_block_expansion.selection import BlockSelection
from kernel_index.routing.legal_blocks import TopBlocks


def with_recall(select: Callable[[HierarchyCall], TopBlocks]) -> Callable[[HierarchyCall], BlockSelection]:
    """A backend's selection with its plan, and with its recall where the call asks for it."""

    def run(call: HierarchyCall) -> BlockSelection:
        found = select(call)
        if not call.recall:
            return BlockSelection(*found, call.plan)
        best = found if call.plan.exhaustive else select(call.exhaustively())
        return BlockSelection(*found, call.plan._replace(recall=share_of(found, best)))

    return run


def share_of(found: TopBlocks, best: TopBlocks) -> float:
    """The share of the blocks of ``best`` that ``found`` has too; reads values, so it waits for the device."""
    same = torch.zeros_like(best.valid)
    for column in found.indices.unbind(-1):  # column by column: no tensor of topk² for each query
        same |= best.indices == column[..., None]
    total = int(best.valid.sum())
    return int((same & best.valid).sum()) / total if total else 1.0
