"""The exhaustive router of a CPU in C++: scores of a few blocks at a time, compared with the least one kept so far."""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.core.numerics import is_invariant
from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.block_router.documents import route_documents
from kernel_index.routing.block_router.scores import means_and_legal
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks

SOURCE = Path(__file__).with_name("routing.cpp")


def route_native(call: RouterCall) -> TopBlocks:
    if is_invariant():
        return route_documents(call)
    with torch.no_grad():
        means, legal = means_and_legal(call)
        return native_top_blocks(call.q, means, legal, call.selected, call.groups)


def native_top_blocks(q: Tensor, means: Tensor, legal: LegalBlocks, topk: int, groups: int) -> TopBlocks:
    """``top_blocks`` of every query's scores; arguments as ``triton_top_blocks``."""
    (batch, queries, heads, width), (blocks, kv_heads) = q.shape, means.shape[1:3]
    first, current = (x.contiguous() for x in legal)
    indices = q.new_empty(batch, queries, groups, topk, dtype=torch.int32)
    sizes = (batch, queries, heads, kv_heads, groups, width, blocks, topk, first.shape[0], torch.get_num_threads())
    tensors = (first, current, q.detach().contiguous(), means.contiguous(), indices)
    native.call(SOURCE, f"route_{native.suffix(q.dtype)}", sizes, (), *tensors)
    return TopBlocks(indices, indices >= 0)
