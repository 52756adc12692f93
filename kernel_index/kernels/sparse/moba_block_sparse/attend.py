"""MoBA over whole sequences: route, then the block-sparse core."""

from torch import Tensor

from kernel_index.core.dispatch import Backend
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseCall
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.router import route


def attend(
    core: Backend,
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
    """``core`` was chosen before and is not chosen again: the receipt tells what ran.  A router has no gradient."""
    picks = route(q, k, block_size, topk, mask, groups)
    return core.run(BlockSparseCall(q, k, v, *picks, block_size, mask, scale, softcap, query_tile_size, None))[0]
