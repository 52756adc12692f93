"""What the backends of the router share: mean keys, legal blocks, and the scores of blocks in plain PyTorch."""

import torch
from torch import Tensor

from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.legal_blocks import LegalBlocks, block_means, group_queries, legal_blocks


def means_and_legal(call: RouterCall) -> tuple[Tensor, LegalBlocks]:
    """The mean keys [B, blocks, K, D], at least float32, and the routable blocks of every query."""
    return block_means(call.k, call.block_size, call.mask), legal_blocks(call.mask, call.sizes, call.block_size)


def block_scores(q: Tensor, means: Tensor, groups: int) -> Tensor:
    """The score of each block for each group of heads, at least float32 [B, T, G, blocks].

    Args:
        q: [B, T, H, D].
        means: [B, blocks, K, D], at least float32.
        groups: G, a multiple of K and a divisor of H.
    """
    return grouped_scores(group_queries(q, groups), means)


def grouped_scores(q_BTGD: Tensor, means_BNKD: Tensor) -> Tensor:
    """One product for each KV head, so that the means are not copied for the groups."""
    queries, groups, kv_heads = q_BTGD.shape[1], q_BTGD.shape[2], means_BNKD.shape[2]
    each = groups // kv_heads
    q_BTKED = q_BTGD.unflatten(2, (kv_heads, each))
    means_BNKD = means_BNKD.to(q_BTGD.dtype)
    by_head = [q_BTKED[:, :, h].flatten(1, 2) @ means_BNKD[:, :, h].transpose(1, 2) for h in range(kv_heads)]
    return torch.stack([scores.unflatten(1, (queries, each)) for scores in by_head], 2).flatten(2, 3)
