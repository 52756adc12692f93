"""The two steps on a CPU in C++: scores of a few queries stay in a core's cache, and one pass chooses among them."""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.routing.forced_blocks import FORCED
from kernel_index.routing.hierarchical_block_expansion.contract import HierarchyCall
from kernel_index.routing.hierarchical_block_expansion.selection import HierarchyPlan
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks

SOURCE = Path(__file__).with_name("hierarchy.cpp")

ONE_THREAD = 1 << 20
"""Up to this many multiplications one thread is done before a second one has begun."""


def select_native(call: HierarchyCall) -> TopBlocks:
    with torch.no_grad():
        return native_select(*call.operands(), call.plan, call.topk)


def native_select(q: Tensor, block_keys: Tensor, legal: LegalBlocks, plan: HierarchyPlan, topk: int) -> TopBlocks:
    """Queries [B, T, K, D] and the keys of the blocks [B, blocks, K, D], both float32."""
    (batch, queries, groups, width), blocks = q.shape, block_keys.shape[1]
    first, current = (x.contiguous() for x in legal)
    indices = q.new_empty(batch, queries, groups, topk, dtype=torch.int32)
    threads = torch.get_num_threads() if q.numel() * blocks > ONE_THREAD else 1
    expanded = plan.metas if plan.exhaustive else plan.coarse_topc
    wanted = (name in plan.forced for name in FORCED)
    sizes = (batch, queries, groups, width, blocks, plan.coarse_ratio, expanded, topk, first.shape[0], *wanted, threads)
    native.call(SOURCE, "search", sizes, (), first, current, q.contiguous(), block_keys.contiguous(), indices)
    return TopBlocks(indices, indices >= 0)
