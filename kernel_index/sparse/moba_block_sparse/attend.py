"""MoBA over whole sequences: route, then the block-sparse core."""

from torch import Tensor

from kernel_index.attention.doc_window_mask.mask import MaskContract
from kernel_index.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.sparse.moba_block_sparse.router import route


def attend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int,
    mask: MaskContract,
    groups: int,
    scale: float | None,
    softcap: float,
    query_tile_size: int,
) -> Tensor:
    """``backend`` is the core's, chosen before; a router has no gradient."""
    picks = route(q, k, block_size, topk, mask, groups)
    return block_sparse_attention(
        q,
        k,
        v,
        picks.indices,
        selected_valid=picks.valid,
        block_size=block_size,
        mask=mask,
        scale=scale,
        softcap=softcap,
        query_tile_size=query_tile_size,
        backend=backend,
    ).out
