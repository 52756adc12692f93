"""Routers over a prefix tree: each branch is routed alone, over the blocks or tokens of its path."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.paths import along_paths
from kernel_index.routing.legal_blocks import TopBlocks


def route_along_paths(
    op: str, run: Callable[..., TopBlocks], mask: MaskContract, sizes: Sizes, q: Tensor, k: Tensor, columns: int
) -> TopBlocks:
    """``run(q, k, mask)`` of each branch; blocks count along its path, and there are ``columns`` of them."""

    def padded(q: Tensor, k: Tensor, mask: MaskContract) -> tuple[Tensor, Tensor]:
        indices, valid = run(q, k, mask)
        more = columns - indices.shape[-1]
        return pad(indices, (0, more), value=-1), pad(valid, (0, more))

    indices, valid = along_paths(op, padded, mask, sizes, (q,), (k,), (1, 1))
    return TopBlocks(torch.where(valid, indices, -1), valid)
