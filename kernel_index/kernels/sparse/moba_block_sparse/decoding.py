"""What the backends of ``moba_decode`` share: the write, the routing, the path of a prompt; and ``triton``."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.kernels.sparse.moba_block_sparse import torch_op
from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaDecodeCall
from kernel_index.kernels.sparse.selected_decode.api import attend_blocks
from kernel_index.kvcache.selected import Visible, query_positions, window_starts
from kernel_index.kvcache.slots import append
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.scores import block_scores
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks, num_blocks, top_blocks

PROMPT = 32
"""A step of more queries than this counts as a prompt: then several queries select most keys."""


class Routed(NamedTuple):
    """The selected blocks of a step [B, Lq, G, n]; a query may attend to their tokens ``start ≤ s ≤ position``.

    int64 [B, Lq]; a position is negative where a row has fewer tokens than queries.
    """

    selected: TopBlocks
    start: Tensor
    position: Tensor


def route(call: MobaDecodeCall) -> Routed:
    """Write the new keys and values, bring the block means up to date, and select each query's blocks."""
    cache = call.cache
    with torch.no_grad():
        append(cache["k_cache"], cache["v_cache"], cache["cache_seqlens"], call.k, call.v, cache["block_table"])
        return select(call)


def select(call: MobaDecodeCall) -> Routed:
    """The blocks of each query, of a cache whose keys are written."""
    q, cache, block_size = call.q, call.cache, call.block_size
    with torch.no_grad():
        position = query_positions(cache, q.shape[1])
        start = window_starts(position, call.window[0])
        has_tokens = position >= 0
        current = torch.where(has_tokens, position // block_size, -1)
        legal = LegalBlocks(torch.where(has_tokens, start // block_size, 0), current)
        blocks = num_blocks(max(cache.lengths_after, default=0), block_size)
        scores = block_scores(q, cache.block_means(block_size), call.groups)
        # The block that is still growing has no mean and needs none: it is selected as the query's current block.
        scores = torch.nn.functional.pad(scores, (0, max(0, blocks - scores.shape[-1])))
        return Routed(top_blocks(scores, legal, min(call.topk, max(1, blocks))), start, position)


SCORES = 1 << 26
"""Of a step whose scores are all stored: one row for each query and group, as long as the cache's capacity."""


def decode_triton(call: MobaDecodeCall) -> Tensor:
    """A step runs wholly on the device.  A prompt selects as the other backends do, by lengths that the host knows."""
    means = call.cache.stored_means(call.block_size)
    (batch, queries), table, left = call.q.shape[:2], call.cache["block_table"], call.window[0]
    seen = Visible(call.cache["cache_seqlens"], table, call.cache.new_tokens, -1 if left is None else left)
    capacity = call.cache["k_cache"].shape[1] * max(1, seen.columns)
    scores = batch * queries * call.groups * num_blocks(capacity, call.block_size)
    if queries <= PROMPT and scores <= SCORES:
        return torch_op.step(call, means)
    torch_op.write(call, means)
    selected = select(call).selected
    blocks = torch.where(selected.valid, selected.indices, -1)
    scoring = call.scale, call.softcap, call.sink
    return attend_blocks(call.q, call.cache, blocks, call.groups, left, call.block_size, *scoring)


def attend_prompt(call: MobaDecodeCall, selected: TopBlocks) -> Tensor:
    """Each row through the block-sparse core, over the row's own keys."""
    outs = []
    for b, total in enumerate(call.cache.lengths_after):
        k, v = call.cache.prefix(b)
        one = slice(b, b + 1)
        result = block_sparse_attention(
            call.q[one],
            k,
            v,
            selected.indices[one],
            selected_valid=selected.valid[one],
            block_size=call.block_size,
            mask=MaskContract(window=(call.window[0], 0), q_offset=total - call.q.shape[1]),
            scale=call.scale,
            softcap=call.softcap,
            sink=call.sink,
        )
        outs.append(result.out)
    return torch.cat(outs)
