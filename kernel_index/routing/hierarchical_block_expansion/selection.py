"""What ``hierarchical_block_select`` returns."""

from typing import NamedTuple

from torch import Tensor


class HierarchyPlan(NamedTuple):
    """What a selection looked at; every number is clamped to what exists.

    ``metas`` groups of ``coarse_ratio`` ``blocks``; ``coarse_topc`` of them are expanded into ``candidates`` blocks.
    ``exhaustive`` where all blocks were scored at once, and ``reason`` why.  ``recall`` is the share of the exhaustive
    selection that was found, None unless asked for.

    >>> import torch, kernel_index as ki
    >>> ki.hierarchical_block_select(torch.ones(1, 8, 1, 4), torch.ones(1, 4, 1, 4), block_size=2).plan.reason
    'blocks ≤ coarse_topc × coarse_ratio: every block would be a candidate'
    """

    blocks: int
    metas: int
    coarse_ratio: int
    coarse_topc: int
    candidates: int
    final_topk: int
    forced: tuple[str, ...]
    exhaustive: bool
    reason: str
    recall: float | None = None


class BlockSelection(NamedTuple):
    """``indices`` int32 [B, T, K, k], ascending, −1 where ``valid`` (bool, the same shape) is False; and the plan.

    >>> import torch, kernel_index as ki
    >>> q, block_keys = torch.ones(1, 4, 1, 1), torch.ones(1, 2, 1, 1)
    >>> ki.hierarchical_block_select(q, block_keys, final_topk=2, block_size=2).indices[0, :, 0].tolist()
    [[0, -1], [0, -1], [0, 1], [0, 1]]
    """

    indices: Tensor
    valid: Tensor
    plan: HierarchyPlan
