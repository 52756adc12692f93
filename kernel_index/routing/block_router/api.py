"""Exhaustive block routing: every legal block is scored for every query, and the best ones are selected."""

from typing import Literal

from torch import Tensor

from kernel_index.core import native
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router import contract, documents_on_device
from kernel_index.routing.block_router.chunked import route_chunked
from kernel_index.routing.block_router.documents import ROUTING
from kernel_index.routing.block_router.native import SOURCE, route_native
from kernel_index.routing.block_router.reference import route_reference
from kernel_index.routing.legal_blocks import TopBlocks

RouterBackend = Literal["auto", "triton", "native", "chunked", "reference"]

BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        documents_on_device.route,
        contract.triton_not_worth,
        contract.details,
        documents_on_device.ROUTING,
    ),
    Backend(
        "native",
        contract.native_why_not,
        route_native,
        native.once_built(SOURCE, not_worth=contract.native_not_worth),
        contract.details,
        ROUTING,
    ),
    Backend("chunked", always, route_chunked, details=contract.details),
    Backend("reference", always, route_reference, details=contract.details),
)


def block_router(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    groups: int,
    mask: MaskContract = EVERYTHING_BEFORE,
    backend: RouterBackend = "auto",
) -> TopBlocks:
    """The current block of each query, and the past blocks whose mean keys score best.

    Block j holds the keys ``[j·block_size, (j + 1)·block_size)``.  For a query at position p, with ``c = p //
    block_size`` and ``q̄[t, g]`` the mean query of the H / G heads of group g, which belongs to one KV head::

        score[j]  = q̄[t, g] · mean(k[s] for s in block j)     j < c, with a key that the mask allows; float32
        selection = {c} ∪ the topk − 1 best j, the smallest index among equals

    Where documents meet inside a block its mean is over the last of them.  No gradient, and no future token has any
    influence.  It is the router of ``moba_attention`` and of ``clustered_sparse_attention``.  Under
    ``numerics("invariant")`` blocks count from the start of each document.

    Args:
        q: [B, T, H, D], any floating dtype.  Under autocast q and k are cast as those of
            ``F.scaled_dot_product_attention``.
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        block_size: keys of a block; the last block may be shorter.
        topk: blocks for each query, the current one counted.
        groups: G, the selections of a query: a multiple of K and a divisor of H.
        mask: which keys each query may attend to; causal.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``TopBlocks(indices, valid)``, int32 and bool [B, T, G, n] with ``n = min(topk, blocks)``: ascending, −1 and
        False where a query has fewer blocks.  Nothing waits for a device.

    Raises:
        TypeError: a tensor or the mask is of the wrong type, or dtypes differ.
        ValueError: shapes, heads or devices do not fit, a size is not positive, or the mask is not causal.
        Ineligible: the named backend cannot run this call.

    Source: the routers of Lu et al., "MoBA", 2025, and Yuan et al., "Native Sparse Attention", 2025.

    >>> import torch
    >>> from kernel_index.routing.block_router.api import block_router
    >>> q, k = torch.ones(1, 8, 1, 1), torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]).view(1, 8, 1, 1)
    >>> block_router(q, k, block_size=2, topk=2, groups=1).indices[0, -1, 0]
    tensor([1, 3], dtype=torch.int32)
    """
    call = contract.check(q, k, block_size, topk, mask, groups)
    return choose("block_router", BACKENDS, backend, call).run(call)
