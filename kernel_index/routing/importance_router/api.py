"""Selects the blocks that attention over compressed blocks weighs most."""

from typing import Literal

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.forced_blocks import ForcedBlock
from kernel_index.routing.importance_router import contract
from kernel_index.routing.importance_router.chunked import route_chunked
from kernel_index.routing.importance_router.reference import route_reference
from kernel_index.routing.importance_router.torch_op import route_triton
from kernel_index.routing.legal_blocks import TopBlocks

ImportanceBackend = Literal["auto", "triton", "chunked", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, route_triton, contract.triton_not_worth, contract.details),
    Backend("chunked", always, route_chunked, details=contract.details),
    Backend("reference", always, route_reference, details=contract.details),
)


def importance_route(
    q: Tensor,
    block_keys: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    topk: int,
    mask: MaskContract = EVERYTHING_BEFORE,
    scale: float | None = None,
    forced: tuple[ForcedBlock, ...] = ("current", "sink", "local"),
    kv_len: int | None = None,
    backend: ImportanceBackend = "auto",
) -> TopBlocks:
    """The blocks that attention over compressed blocks weighs most, summed over the heads of a KV head.

    A compressed block j is one key for all tokens of the block; a query at position p may attend to those before its
    current block ``c = p // block_size`` that hold a key which the mask allows.  With ``lse`` the log-sum-exp of that
    attention::

        importance[t, g, j] = Σ_h exp(scale · q[t, h]·block_keys[j, g] − lse[h, t])      over the H / K heads h of g
        selection[t, g]     = the forced blocks, then the most important ones, topk in all

    Sums are float32; among equal ones the smallest index wins.  No token after a query has any influence on its
    selection.  No gradient.

    Args:
        q: [B, T, H, D], any floating dtype.  Under autocast q and block_keys are cast as the arguments of
            ``F.scaled_dot_product_attention``.
        block_keys: [B, N, K, D], q's dtype: one key for each of the ``N = S // block_size`` complete blocks, such as
            the mean of its keys; H is a multiple of K.
        lse: [B, H, T], what ``attention_with_lse`` gave for these blocks; −inf where a query has none.
        block_size: tokens of a block.
        topk: blocks for each query, the forced ones counted.
        mask: which keys each query may attend to; causal.
        scale: factor of the scores; ``D ** -0.5`` by default.
        forced: blocks that are selected whatever their weight, of ``"current"`` (it holds the query), ``"sink"`` (the
            first that the query may attend to) and ``"local"`` (the one before the current).
        kv_len: S, the number of keys.  By default that of the mask's documents, else T.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``TopBlocks(indices, valid)``, int32 and bool [B, T, K, n] with ``n = min(topk, blocks)``: ascending, −1 and
        False where a query has fewer blocks.  Nothing waits for a device.

    Raises:
        TypeError: a tensor or the mask is of the wrong type, or dtypes differ.
        ValueError: shapes, heads or devices do not fit, a size is out of range, or the mask is not causal.
        Ineligible: the named backend cannot run this call.

    Source: Yuan et al., "Native Sparse Attention", 2025 (arXiv 2502.11089), equations 8 to 10.

    >>> import torch, kernel_index as ki
    >>> q, block_keys = torch.ones(1, 10, 1, 1), torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0]).view(1, 5, 1, 1)
    >>> lse = torch.zeros(1, 1, 10)
    >>> ki.importance_route(q, block_keys, lse, block_size=2, topk=2, forced=("current",)).indices[0, -1, 0]
    tensor([2, 4], dtype=torch.int32)
    """
    call = contract.check(q, block_keys, lse, block_size, topk, mask, scale, forced, kv_len)
    return choose("importance_route", BACKENDS, backend, call).run(call)
