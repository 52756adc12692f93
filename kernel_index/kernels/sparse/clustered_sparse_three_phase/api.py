"""Attention in three phases: score blocks, join the selections of neighbouring queries, attend to what was selected."""

import functools
import math
from typing import Literal

from torch import Tensor

from kernel_index.core import native
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.kernels.attention.dense_attention.api import BACKENDS as DENSE_BACKENDS
from kernel_index.kernels.sparse.block_sparse_attention.api import BACKENDS as CORE_BACKENDS
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseOutput
from kernel_index.kernels.sparse.clustered_sparse_three_phase import contract, routers
from kernel_index.kernels.sparse.clustered_sparse_three_phase.attend import join, run_dense, run_sparse
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.kernels.sparse.clustered_sparse_three_phase.contract import ClusteredCall
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.paths import along_paths
from kernel_index.routing.block_router import documents_on_device
from kernel_index.routing.block_router.api import RouterBackend
from kernel_index.routing.block_router.documents import ROUTING
from kernel_index.routing.block_router.native import SOURCE as BY_BLOCK
from kernel_index.routing.branches import route_along_paths
from kernel_index.routing.hierarchical_block_expansion.native import SOURCE as BY_GROUP
from kernel_index.routing.legal_blocks import TopBlocks

ClusteredBackend = Literal["auto", "triton", "native", "cpu", "reference"]


def _on_core(core: Backend) -> Backend:
    """The phases of routing and then a backend of the block-sparse core, under the core's own rules."""
    return Backend(
        core.name,
        functools.partial(contract.core_why_not, core.why_not),
        functools.partial(run_sparse, core),
        None if core.not_worth is None else functools.partial(contract.core_why_not, core.not_worth),
        functools.partial(contract.details, core.name),
        core.invariant,
    )


def _on_dense(dense: Backend) -> Backend:
    """A backend of dense attention for a call whose unions hold too much."""
    return Backend(
        dense.name,
        functools.partial(contract.on_dense, dense.why_not),
        functools.partial(run_dense, dense),
        None if dense.not_worth is None else functools.partial(contract.on_dense, dense.not_worth),
        None if dense.details is None else functools.partial(contract.on_dense, dense.details),
        dense.invariant,
    )


BACKENDS = tuple(_on_core(core) for core in CORE_BACKENDS)
REROUTED = tuple(_on_dense(dense) for dense in DENSE_BACKENDS)
ROUTERS = (
    Backend(
        "triton",
        contract.triton_router_why_not,
        routers.route_triton,
        contract.triton_router_not_worth,
        contract.router_details,
        documents_on_device.ROUTING,
    ),
    Backend(
        "native",
        contract.native_router_why_not,
        routers.route_native,
        native.once_built(BY_BLOCK, BY_GROUP, not_worth=contract.native_router_not_worth),
        contract.router_details,
        ROUTING,
    ),
    Backend("chunked", always, routers.route_chunked, details=contract.router_details),
    Backend("reference", always, routers.route_reference, details=contract.router_details),
)


def clustered_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: ClusteredSparseConfig,
    mask: MaskContract = EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: ClusteredBackend = "auto",
) -> Tensor:
    """Attention of each query to its current block and to the past blocks that its group of heads scores best.

    Three phases, of which only the last has a gradient.  With ``q̄[t, g]`` the mean query of the H / K heads of KV
    head g, and c the block that holds t::

        1  score[j] = q̄[t, g] · mean(k[s, g] for s in block j)      past blocks with a key that the mask allows
           selected = {c} ∪ the topk − 1 best j, the smallest index among equals
        2  union    = the blocks selected by query_tile_size neighbouring queries; each query's own are kept apart
        3  out[t]   = softmax(scale · q·k over the keys of t's own selected blocks that the mask allows) · v

    A sink is one more term ``exp(sink[h])`` of the softmax's denominator.  Scores are float32.  No future token has any
    influence on a selection; a query never attends to a block that only its neighbours selected; with ``topk ≥ blocks``
    the result is ``ki.attention``.  Backward gives the same bits every time.  Under ``numerics("invariant")`` blocks
    count from the start of each document.

    The receipt's details: ``path`` (``clustered``, ``reroute_to_dense``), ``reason``, ``phase_order``, the backend of
    each phase, ``routed_by`` (the backend of ``clustered_route`` that ran), ``routing_is_stop_gradient``,
    ``attention_is_differentiable``, ``blocks``, ``picks``, ``density``, tiles scored and skipped by the causal
    windowing plan, whether this mask and config were met before (``mask_cache``), and the unions' sizes where the
    config asks for them.  After a reroute the receipt's ``ran`` is the backend of dense attention that ran.

    Args:
        q: [B, T, H, D], any floating dtype.  Under autocast q, k and v are cast as those of
            ``F.scaled_dot_product_attention``.
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        config: sizes and choices.
        mask: which keys each query may attend to, besides its selection; causal.
        scale: factor of the attention's scores; ``D ** -0.5`` by default.
        softcap: bound of the attention's scores; 0 is off.
        sink: [H], learnable sink logits: terms of the denominator without a value; None for no such term.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.  ``"reference"`` routes
            by the reference too; otherwise the router is chosen as by ``clustered_route``.

    Returns:
        [B, T, H, Dv], contiguous, q's dtype.  A query that may attend to nothing gives exactly 0.

    Raises:
        TypeError: a tensor, the config or the mask is of the wrong type, or dtypes differ.
        ValueError: shapes, heads or devices do not fit, or the mask is not causal.
        Ineligible: the named backend cannot run this call.

    Source: Yuan et al., "Native Sparse Attention", 2025, for blocks selected by groups of heads; the union is that of
        ``union_selection``.

    >>> import torch, kernel_index as ki
    >>> k = torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]).view(1, 8, 1, 1)
    >>> v = torch.arange(8.0).view(1, 8, 1, 1)
    >>> config = ki.ClusteredSparseConfig(block_size=2, topk=1)
    >>> ki.clustered_sparse_attention(torch.ones(1, 8, 1, 1), k, v, config=config)[0, :, 0, 0]
    tensor([0.0000, 0.5000, 2.0000, 2.5000, 4.0000, 4.5000, 6.0000, 6.5000])
    """
    call = contract.check(q, k, v, config, mask, scale, softcap, sink, with_lse=False)
    return _attend("clustered_sparse_attention", call, backend)[0]


def clustered_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: ClusteredSparseConfig,
    mask: MaskContract = EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: ClusteredBackend = "auto",
) -> BlockSparseOutput:
    """``clustered_sparse_attention`` together with the logarithm of each query's denominator, natural logarithm.

    Args:
        q: as in ``clustered_sparse_attention``, and so are the others.

    Returns:
        ``BlockSparseOutput(out [B, T, H, Dv], lse [B, H, T])``; both carry gradients.  −inf where nothing is attended.

    Raises:
        TypeError, ValueError, Ineligible: as ``clustered_sparse_attention``.

    Source: as ``clustered_sparse_attention``.

    >>> import torch, kernel_index as ki
    >>> x, config = torch.zeros(1, 4, 1, 8), ki.ClusteredSparseConfig(block_size=2, topk=1)
    >>> ki.clustered_sparse_attention_with_lse(x, x, x, config=config).lse.exp()
    tensor([[[1., 2., 1., 2.]]])
    """
    call = contract.check(q, k, v, config, mask, scale, softcap, sink, with_lse=True)
    return BlockSparseOutput(*_attend("clustered_sparse_attention_with_lse", call, backend))


def _attend(op: str, call: ClusteredCall, backend: str) -> tuple[Tensor, ...]:
    """``out``, and ``lse`` where the call asks for it."""
    if call.mask.is_tree:

        def attend_branch(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract) -> tuple[Tensor, ...]:
            return _attend(op, call._replace(q=q, k=k, v=v, mask=mask), backend)

        by_key, gaps = (call.k, call.v), (0.0, -math.inf)
        sizes = call.routing.exhaustive.sizes
        return along_paths(op, attend_branch, call.mask, sizes, (call.q,), by_key, (1, 2), gaps)
    found = _attend_to_row(op, call, backend)
    return found if call.with_lse else found[:1]


def _attend_to_row(op: str, call: ClusteredCall, backend: str) -> tuple[Tensor, ...]:
    choice = choose(op, BACKENDS, backend, call)
    router = choice.choose("clustered_route", ROUTERS, call.routing)
    scoring = contract.scoring_name(call.routing, router.backend.name)
    choice = choice.with_details(routed_by=router.backend.name, scoring_backend=scoring)
    if call.config.reads_unions is None:
        return choice.run(call, router, None)
    joined = join(choice, call, router)
    choice = choice.with_details(union_backend=joined.joined_by, **contract.union_shares(joined.unions))
    if not joined.above:
        return choice.run(call, router, joined)
    said = dict(choice.details) | contract.rerouted()
    return choose(op, REROUTED, backend, call).with_details(**said).run(call)


def clustered_route(
    q: Tensor,
    k: Tensor,
    *,
    config: ClusteredSparseConfig,
    mask: MaskContract = EVERYTHING_BEFORE,
    backend: RouterBackend = "auto",
) -> TopBlocks:
    """The blocks that ``clustered_sparse_attention`` selects: to record, to look at, or to join by ``union_selection``.

    Args:
        q: [B, T, H, D], and the others as in ``clustered_sparse_attention``.
        backend: ``"auto"`` or the name of a backend of the router; a named backend runs or raises ``Ineligible``.

    Returns:
        ``TopBlocks(indices, valid)``, int32 and bool [B, T, K, n] with ``n = min(topk, blocks)``: ascending, −1 and
        False where a query has fewer blocks.

    Raises:
        TypeError, ValueError: as ``clustered_sparse_attention``.
        Ineligible: the named backend cannot run this call.

    Source: as ``clustered_sparse_attention``.

    >>> import torch, kernel_index as ki
    >>> x = torch.randn(1, 6, 1, 4)
    >>> ki.clustered_route(x, x, config=ki.ClusteredSparseConfig(block_size=2, topk=1)).indices.flatten()
    tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    """
    call = contract.check(q, k, k, config, mask, None, 0.0, None, with_lse=False).routing
    if mask.is_tree:

        def route_branch(q: Tensor, k: Tensor, mask: MaskContract) -> TopBlocks:
            return clustered_route(q, k, config=config, mask=mask, backend=backend)

        scored = call.exhaustive
        return route_along_paths("clustered_route", route_branch, mask, scored.sizes, call.q, call.k, scored.selected)
    return choose("clustered_route", ROUTERS, backend, call).run(call)
