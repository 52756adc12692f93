"""Phase 1, the selection of each query's blocks by its group of heads, for every backend.  No gradient."""

import torch
from torch import Tensor

from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.sparse.clustered_sparse_three_phase.contract import ClusteredRouteCall
from kernel_index.kernels.sparse.clustered_sparse_three_phase.scoring_chunks import Chunk, chunks_of
from kernel_index.masks.attention_arguments import sizes_of
from kernel_index.routing.block_router.api import BACKENDS as EXHAUSTIVE
from kernel_index.routing.block_router.documents import route_documents
from kernel_index.routing.block_router.documents_on_device import route_on_device
from kernel_index.routing.block_router.scores import means_and_legal
from kernel_index.routing.hierarchical_block_expansion.api import BACKENDS as HIERARCHICAL
from kernel_index.routing.hierarchical_block_expansion.contract import check as check_hierarchy
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks, block_means, group_queries, top_blocks

_EXHAUSTIVE = {backend.name: backend.run for backend in EXHAUSTIVE}
_HIERARCHICAL = {backend.name: backend.run for backend in HIERARCHICAL}


def route_triton(call: ClusteredRouteCall) -> TopBlocks:
    if is_invariant():
        return route_on_device(call.exhaustive, call.config.hierarchy)
    return _EXHAUSTIVE["triton"](call.exhaustive)


def route_native(call: ClusteredRouteCall) -> TopBlocks:
    if is_invariant():
        return route_documents(call.exhaustive, call.config.hierarchy or (0, 0))
    return _by_groups("native", call) if call.by_groups else _EXHAUSTIVE["native"](call.exhaustive)


def route_reference(call: ClusteredRouteCall) -> TopBlocks:
    return _by_groups("reference", call) if call.by_groups else _EXHAUSTIVE["reference"](call.exhaustive)


def route_chunked(call: ClusteredRouteCall) -> TopBlocks:
    if call.by_groups:
        return _by_groups("chunked", call)
    with torch.no_grad():
        q, k, config, mask = call
        sizes, topk = sizes_of(q, k, mask), call.exhaustive.selected
        means, legal = means_and_legal(call.exhaustive)
        queries, keys = group_queries(q, k.shape[2]).transpose(1, 2), means.permute(0, 2, 3, 1)
        if torch.compiler.is_compiling() or sizes.queries == 0:  # a trace serves every length: no loop over chunks
            return top_blocks((queries @ keys).transpose(1, 2), legal, topk)
        chunks = chunks_of(mask, sizes, config.block_size)
        if not config.fused_scoring:
            return top_blocks(_all_scores(queries, keys, chunks), legal, topk)
        found = []
        for at, blocks, _ in chunks:
            scores = (queries[:, :, at] @ keys[..., blocks]).transpose(1, 2)
            legal_here = LegalBlocks(*(x[:, at] for x in legal))
            found.append(top_blocks(scores, legal_here, topk, first_block=blocks.start))
        return TopBlocks(*(torch.cat(x, 1) for x in zip(*found, strict=True)))


def _all_scores(queries: Tensor, keys: Tensor, chunks: tuple[Chunk, ...]) -> Tensor:
    """Scores [B, T, K, blocks], written where the plans say; the skipped ones stay −∞."""
    scores = torch.full((*queries.shape[:3], keys.shape[-1]), -torch.inf, dtype=queries.dtype, device=queries.device)
    for at, blocks, _ in chunks:
        scores[:, :, at, blocks] = queries[:, :, at] @ keys[..., blocks]
    return scores.transpose(1, 2)


def _by_groups(backend: str, call: ClusteredRouteCall) -> TopBlocks:
    config, mask = call.config, call.mask
    assert config.hierarchy is not None
    ratio, topc = config.hierarchy
    means = block_means(call.k, config.block_size, mask)
    topk, keys = call.exhaustive.selected, call.k.shape[1]
    search = check_hierarchy(call.q, means, ratio, topc, topk, mask, config.block_size, ("current",), keys, False)
    selection = _HIERARCHICAL[backend](search)
    return TopBlocks(selection.indices, selection.valid)
