"""The exhaustive router of a CPU in C++: scores of a few blocks at a time, compared with the least one kept so far."""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.masks.attention_arguments import host_plan_why_not
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks

SOURCE = Path(__file__).with_name("routing.cpp")

FEW = 1 << 16
"""Up to this many scores the plain formula takes no longer."""


def native_why_not(q: Tensor, blocks: int, groups: int) -> str | None:
    """Why the native router does not serve this call, or None; a rule reads metadata only."""
    if (rule := host_plan_why_not(q) or native.why_not(q)) is not None:
        return rule
    return "too few scores for it to pay" if q.shape[0] * q.shape[1] * groups * blocks <= FEW else None


def native_top_blocks(q: Tensor, means: Tensor, legal: LegalBlocks, topk: int, groups: int) -> TopBlocks:
    """``top_blocks`` of every query's scores; arguments as ``fused_top_blocks``."""
    (batch, queries, heads, width), (blocks, kv_heads) = q.shape, means.shape[1:3]
    first, current = (x.contiguous() for x in legal)
    indices = q.new_empty(batch, queries, groups, topk, dtype=torch.int32)
    sizes = (batch, queries, heads, kv_heads, groups, width, blocks, topk, first.shape[0], torch.get_num_threads())
    tensors = (first, current, q.detach().contiguous(), means.contiguous(), indices)
    native.call(SOURCE, f"route_{native.suffix(q.dtype)}", sizes, (), *tensors)
    return TopBlocks(indices, indices >= 0)
