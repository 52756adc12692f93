"""Who may call ``clustered_sparse_attention``, and what its receipt says."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseCall
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.kernels.sparse.clustered_sparse_three_phase.scoring import chunks_of
from kernel_index.masks import attention_arguments as arguments
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.exact_mask_contract_cache.api import exact_mask_key
from kernel_index.masks.exact_mask_contract_cache.cache import MaskKernelCache
from kernel_index.routing.block_router.native import native_why_not
from kernel_index.routing.block_router.torch_op import fused_why_not
from kernel_index.routing.hierarchical_block_expansion.contract import native_why_not as search_why_not
from kernel_index.routing.legal_blocks import TopBlocks, check_causal, num_blocks
from kernel_index.routing.union_selection_query_mask.api import resolve_mode
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps, UnionTelemetry

ABOVE = "union_above_dense_above"
PHASES = ("scoring", "union", "attention")


class Routed(NamedTuple):
    """Phases 1 and 2, done before the decision because the call asks for what only their values can tell."""

    picks: TopBlocks
    maps: UnionMaps
    unions: UnionTelemetry
    dense: bool


def check(q: Tensor, k: Tensor, v: Tensor, config: Any, mask: Any, scale: Any, softcap: Any) -> None:
    arguments.check_attention(q, k, v, mask, scale, softcap)
    if q.shape[2] < 1:
        raise ValueError(f"q must be of at least one head, got shape {tuple(q.shape)}")
    if not isinstance(config, ClusteredSparseConfig):
        raise TypeError(f"config must be a ClusteredSparseConfig, got {type(config).__name__}")
    check_causal(mask)


def as_core(rule: Callable[..., str | None]) -> Callable[..., str | None]:
    """A rule of the core for a call whose picks are not made yet."""

    def core_rule(
        q: Tensor, k: Tensor, v: Tensor, config: ClusteredSparseConfig, mask: MaskContract, *rest: Any
    ) -> str | None:
        selected = q  # a rule reads the selection's device alone, and that will be q's
        tile = config.query_tile_size
        return rule(BlockSparseCall(q, k, v, selected, None, config.block_size, mask, rest[0], rest[1], tile, None))

    core_rule.__wrapped__ = rule  # type: ignore[attr-defined]  # the index reads a rule's sentences from its source
    return core_rule


KERNELS = MaskKernelCache(maxsize=256)
"""What has been planned for the static part of a mask and a config: the receipt tells a hit from a miss."""


def details(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: ClusteredSparseConfig,
    mask: MaskContract,
    scale: float | None,
    softcap: float,
    routed: Routed | None,
) -> tuple[tuple[str, Any], ...]:
    rerouted = routed is not None and routed.dense
    static = (
        ("path", "reroute_to_dense" if rerouted else "clustered"),
        ("reason", ABOVE if rerouted else ""),
        ("phase_order", PHASES),
        ("routing_is_stop_gradient", True),
        ("attention_is_differentiable", True),
        ("scoring_backend", _scoring_name(q, k, config)),
        ("attention_backend", "dense_attention" if rerouted else backend),
    )
    if torch.compiler.is_compiling():  # sizes are symbols there
        return static
    blocks = num_blocks(k.shape[1], config.block_size)
    picks = min(config.topk, blocks)
    union = resolve_mode(config.union_mode, config.query_tile_size * picks, blocks)
    sizes = (
        ("union_backend", union if routed is not None else OWN_UNION if backend == "triton" else NO_UNION),
        ("blocks", blocks),
        ("picks", picks),
        ("density", picks / blocks if blocks else 0.0),
        ("mask_cache", _looked_up(q, config, mask, backend)),
    )
    return static + sizes + _windowing(q, k, config, mask) + (() if routed is None else _unions(routed.unions))


OWN_UNION = "sort, by the tiles of the kernels"
NO_UNION = "none: this backend goes by key block and needs no union"


def _scoring_name(q: Tensor, k: Tensor, config: ClusteredSparseConfig) -> str:
    if config.hierarchy is not None:
        return "hierarchical" if search_why_not(q, k) is not None else "hierarchical, by native"
    if not config.fused_scoring:
        return "exhaustive"
    if fused_why_not(q, config.topk) is None:
        return "exhaustive, fused by triton"
    by_native = native_why_not(q, num_blocks(k.shape[1], config.block_size), k.shape[2]) is None
    return "exhaustive, fused by native" if by_native else "exhaustive, fused"


def _windowing(q: Tensor, k: Tensor, config: ClusteredSparseConfig, mask: MaskContract) -> tuple[tuple[str, int], ...]:
    if config.hierarchy is not None:
        return ()
    plans = [chunk.plan for chunk in chunks_of(mask, arguments.sizes_of(q, k, mask), config.block_size)]
    return (
        ("tiles_scored", sum(len(p.active_tiles) for p in plans)),
        ("tiles_skipped_future", sum(p.skipped_future_tiles for p in plans)),
        ("tiles_skipped_past", sum(p.skipped_past_tiles for p in plans)),
    )


def _unions(unions: UnionTelemetry) -> tuple[tuple[str, float], ...]:
    return (
        ("mean_union_over_picks", unions.mean_over_picks),
        ("max_union_over_picks", unions.max_over_picks),
        ("mean_union_over_blocks", unions.mean_over_blocks),
        ("max_union_over_blocks", unions.max_over_blocks),
    )


def _looked_up(q: Tensor, config: ClusteredSparseConfig, mask: MaskContract, backend: str) -> str:
    tiles = (config.query_tile_size, config.block_size)
    key = exact_mask_key(mask, block_sizes=tiles, dtype=q.dtype, backend=backend)
    built: list[Any] = []  # the cache's own counts are changed by other threads too
    KERNELS.get(key, built.append)
    return "miss" if built else "hit"
