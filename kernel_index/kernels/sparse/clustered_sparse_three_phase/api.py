"""Attention in three phases: score blocks, join the picks of neighbouring queries, attend to what was picked."""

import functools
from dataclasses import replace

from torch import Tensor

from kernel_index.core.dispatch import Backend, choose
from kernel_index.kernels.sparse.block_sparse_attention.api import BACKENDS as CORE_BACKENDS
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseOutput
from kernel_index.kernels.sparse.clustered_sparse_three_phase import contract
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.kernels.sparse.clustered_sparse_three_phase.phases import routed, run_dense, run_sparse
from kernel_index.kernels.sparse.clustered_sparse_three_phase.scoring import pick_blocks
from kernel_index.masks.attention_arguments import sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.legal_blocks import TopBlocks


def _on_core(core: Backend) -> Backend:
    """A backend of the block-sparse core behind the phases of routing, under the core's own rules."""
    return Backend(
        core.name,
        contract.as_core(core.why_not),
        functools.partial(run_sparse, core),
        None if core.not_worth is None else contract.as_core(core.not_worth),
        functools.partial(contract.details, core.name),
    )


BACKENDS = tuple(_on_core(core) for core in CORE_BACKENDS)

EVERYTHING_BEFORE = MaskContract()


def clustered_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: ClusteredSparseConfig,
    mask: MaskContract = EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of each query to its own block and to the past blocks that its group of heads scores best.

    Three phases, of which only the last has a gradient.  With ``q̄[t, g]`` the mean query of the H / K heads of key
    head g, and c the block that holds t::

        1  score[j] = q̄[t, g] · mean(k[s, g] for s in block j)      past blocks with a key that the mask allows
           picks    = {c} ∪ the topk − 1 best j, the smallest index among equals
        2  union    = the picks of query_tile_size neighbouring queries, each query's own kept apart
        3  out[t]   = softmax(scale · q·k over the keys of t's own picks that the mask allows) · v

    Scores are float32.  No future token has any influence on a pick; a query never attends to a block that only its
    neighbours picked; with ``topk ≥ blocks`` the result is ``ki.attention``.  Backward gives the same bits every time.

    The receipt's details: ``path`` (``clustered``, ``reroute_to_dense``), ``reason``, ``phase_order``, the backend of
    each phase, ``routing_is_stop_gradient``, ``attention_is_differentiable``, ``blocks``, ``picks``, ``density``, tiles
    scored and skipped by the causal windowing plan, whether this mask and config were met before (``mask_cache``), and
    the unions' sizes where the config asks for them.

    Args:
        q: [B, T, H, D], any floating dtype.
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        config: sizes and choices.
        mask: who may attend to whom beside that; causal.
        scale: factor of the attention's scores; ``D ** -0.5`` by default.
        softcap: bound of the attention's scores; 0 is off.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [B, T, H, Dv], contiguous, q's dtype.  A query that may attend to nothing gives exactly 0.

    Raises:
        TypeError: a tensor, the config or the mask is of the wrong type, or dtypes differ.
        ValueError: shapes, heads or devices do not fit, or the mask is not causal.
        Ineligible: the named backend cannot run this call.

    Source: Yuan et al., "Native Sparse Attention", 2025: blocks picked by groups of heads; union: ``union_selection``.

    >>> import torch, kernel_index as ki
    >>> k = torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]).view(1, 8, 1, 1)
    >>> v = torch.arange(8.0).view(1, 8, 1, 1)
    >>> config = ki.ClusteredSparseConfig(block_size=2, topk=1)
    >>> ki.clustered_sparse_attention(torch.ones(1, 8, 1, 1), k, v, config=config)[0, :, 0, 0]
    tensor([0.0000, 0.5000, 2.0000, 2.5000, 4.0000, 4.5000, 6.0000, 6.5000])
    """
    return _attend("clustered_sparse_attention", q, k, v, config, mask, scale, softcap, backend)[0]


def clustered_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: ClusteredSparseConfig,
    mask: MaskContract = EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
) -> BlockSparseOutput:
    """``clustered_sparse_attention`` together with the log-sum-exp of each query's scores, natural logarithm.

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
    op = "clustered_sparse_attention_with_lse"
    return BlockSparseOutput(*_attend(op, q, k, v, config, mask, scale, softcap, backend))


def _attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: ClusteredSparseConfig,
    mask: MaskContract,
    scale: float | None,
    softcap: float,
    backend: str,
) -> tuple[Tensor, ...]:
    contract.check(q, k, v, config, mask, scale, softcap)
    asked = config.dense_above is not None or config.report_unions
    known = routed(q, k, config, mask) if asked else None
    call = (q, k, v, config, mask, scale, softcap, known)
    choice = choose(op, BACKENDS, backend, *call)
    if known is None or not known.dense:
        return choice.run(*call)
    # The same contract served by the dense wrapper, which writes a receipt of its own about the kernel that it takes.
    run = functools.partial(run_dense, backend, with_lse=op.endswith("_with_lse"))
    return replace(choice, backend=replace(choice.backend, name="dense", run=run)).run(*call)


def clustered_route(
    q: Tensor, k: Tensor, *, config: ClusteredSparseConfig, mask: MaskContract = EVERYTHING_BEFORE
) -> TopBlocks:
    """The blocks that ``clustered_sparse_attention`` picks: to record, to look at, or to join by ``union_selection``.

    Args:
        q: [B, T, H, D], and the others as in ``clustered_sparse_attention``.

    Returns:
        ``TopBlocks(indices, valid)``, int32 and bool [B, T, K, n] with ``n = min(topk, blocks)``: ascending, −1 and
        False where a query has fewer blocks.

    Raises:
        TypeError, ValueError: as ``clustered_sparse_attention``.

    Source: as ``clustered_sparse_attention``.

    >>> import torch, kernel_index as ki
    >>> x = torch.randn(1, 6, 1, 4)
    >>> ki.clustered_route(x, x, config=ki.ClusteredSparseConfig(block_size=2, topk=1)).indices.flatten()
    tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    """
    contract.check(q, k, k, config, mask, None, 0.0)
    return pick_blocks(q, k, config, mask, sizes_of(q, k, mask))
