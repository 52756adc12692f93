"""Argument checks and backend eligibility of ``clustered_sparse_attention`` and ``clustered_route``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.attention.dense_attention.api import AttentionCall
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseCall
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.kernels.sparse.clustered_sparse_three_phase.scoring_chunks import chunks_of
from kernel_index.masks import attention_arguments as arguments
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.exact_mask_contract_cache.api import exact_mask_key
from kernel_index.masks.exact_mask_contract_cache.cache import MaskKernelCache
from kernel_index.routing.block_router import contract as exhaustive
from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.hierarchical_block_expansion import contract as hierarchical
from kernel_index.routing.legal_blocks import check_causal, num_blocks, without_empty_end
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps, UnionTelemetry

ABOVE = "union_above_dense_above"
PHASES = ("scoring", "union", "attention")


class ClusteredRouteCall(NamedTuple):
    """One checked call of the router: the heads of a KV head share a selection."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    config: ClusteredSparseConfig
    mask: MaskContract

    @property
    def exhaustive(self) -> RouterCall:
        """The call that scores every legal block."""
        block_size = without_empty_end(self.config.block_size, self.k.shape[1])
        return RouterCall(self.q, self.k, block_size, self.config.topk, self.mask, self.k.shape[2])

    @property
    def by_groups(self) -> bool:
        """Whether blocks are searched in two steps: groups of blocks first.  Nothing is searched among no blocks."""
        return self.config.hierarchy is not None and self.q.shape[1] * self.k.shape[1] > 0


class ClusteredCall(NamedTuple):
    """One checked call of the attention."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor  # [B, S, K, Dv]
    config: ClusteredSparseConfig
    mask: MaskContract
    scale: float | None
    softcap: float
    sink: Tensor | None  # [H]
    with_lse: bool

    @property
    def routing(self) -> ClusteredRouteCall:
        return ClusteredRouteCall(self.q, self.k, self.config, self.mask)

    @property
    def dense(self) -> AttentionCall:
        """The same attention over every key that the mask allows."""
        return AttentionCall(self.q, self.k, self.v, self.mask, self.scale, self.softcap, self.sink, self.with_lse)

    def on_core(self, selected: Tensor, selected_valid: Tensor | None, maps: UnionMaps | None) -> BlockSparseCall:
        """The call of the block-sparse core that attends to these blocks."""
        config = self.config
        return BlockSparseCall(
            self.q,
            self.k,
            self.v,
            selected,
            selected_valid,
            without_empty_end(config.block_size, self.k.shape[1]),
            self.mask,
            self.scale,
            self.softcap,
            config.query_tile_size,
            maps,
            self.sink,
        )


def check(
    q: Tensor, k: Tensor, v: Tensor, config: Any, mask: Any, scale: Any, softcap: Any, sink: Any, *, with_lse: bool
) -> ClusteredCall:
    q, k, v = cast_like_sdpa(q, k, v)
    arguments.check_attention(q, k, v, mask, scale, softcap, sink)
    if q.shape[2] < 1:
        raise ValueError(f"q must be of at least one head, got shape {tuple(q.shape)}")
    if not isinstance(config, ClusteredSparseConfig):
        raise TypeError(f"config must be a ClusteredSparseConfig, got {type(config).__name__}")
    check_causal(mask)
    return ClusteredCall(q, k, v, config, mask, scale, softcap, sink, with_lse)


def core_why_not(rule: Callable[..., str | None], call: ClusteredCall) -> str | None:
    """A rule of the block-sparse core before there is a selection: a rule reads its device alone, which is q's."""
    asked = call.config.reads_unions
    if asked and (torch.compiler.is_compiling() or rules.inside_functorch()):
        return f"config.{asked} reads the sizes of unions on the host, which a trace or a transform forbids"
    if is_invariant() and call.config.dense_above is not None:
        return "dense_above decides by what the queries of a whole batch selected"
    return rule(call.on_core(call.q, None, None))


def on_dense(function: Callable[..., Any], call: ClusteredCall) -> Any:
    """A rule or the details of dense attention for the call that it takes over."""
    return function(call.dense)


# The router

HOLDS_SCORES = "fused_scoring=False holds the scores of all blocks"


def triton_router_why_not(call: ClusteredRouteCall) -> str | None:
    if is_invariant():
        return exhaustive.triton_why_not(call.exhaustive)
    if call.by_groups:
        return "searches every block: with a hierarchy groups of blocks are searched first"
    if not call.config.fused_scoring:
        return HOLDS_SCORES
    return exhaustive.triton_why_not(call.exhaustive)


def triton_router_not_worth(call: ClusteredRouteCall) -> str | None:
    return exhaustive.triton_not_worth(call.exhaustive)


def native_router_why_not(call: ClusteredRouteCall) -> str | None:
    if is_invariant():
        return exhaustive.native_why_not(call.exhaustive)
    if call.by_groups:
        return hierarchical.keys_why_not(call.q, call.k)
    if not call.config.fused_scoring:
        return HOLDS_SCORES
    return exhaustive.native_why_not(call.exhaustive)


def native_router_not_worth(call: ClusteredRouteCall) -> str | None:
    return None if call.by_groups else exhaustive.native_not_worth(call.exhaustive)


def router_details(call: ClusteredRouteCall) -> tuple[tuple[str, Any], ...]:
    return exhaustive.details(call.exhaustive)


# What the receipt says

OWN_UNION = "sort, by the tiles of the kernels"
NO_UNION = "none: this backend goes by key block and needs no union"
KERNELS = MaskKernelCache(maxsize=256)
"""What has been planned for the static part of a mask and a config: the receipt tells a hit from a miss."""


def details(backend: str, call: ClusteredCall) -> tuple[tuple[str, Any], ...]:
    static = (
        ("path", "clustered"),
        ("reason", ""),
        ("phase_order", PHASES),
        ("routing_is_stop_gradient", True),
        ("attention_is_differentiable", True),
        ("attention_backend", backend),
    )
    if torch.compiler.is_compiling():  # sizes are symbols there
        return static
    shares = exhaustive.shares(num_blocks(call.k.shape[1], call.config.block_size), call.config.topk)
    union = ("union_backend", OWN_UNION if backend == "triton" else NO_UNION)
    return (*static, union, *shares, ("mask_cache", _looked_up(call, backend)), *_windowing(call))


def scoring_name(call: ClusteredRouteCall, router: str) -> str:
    """What scores the blocks, by the router's backend."""
    if call.config.hierarchy is not None:
        return "hierarchical, by native" if router == "native" else "hierarchical"
    if not call.config.fused_scoring or router == "reference":
        return "exhaustive"
    return "exhaustive, fused" if router == "chunked" else f"exhaustive, fused by {router}"


def rerouted() -> dict[str, Any]:
    """What changes in the details where dense attention takes over."""
    return {"path": "reroute_to_dense", "reason": ABOVE, "attention_backend": "dense_attention"}


def union_shares(unions: UnionTelemetry) -> dict[str, float]:
    return {
        "mean_union_over_picks": unions.mean_over_picks,
        "max_union_over_picks": unions.max_over_picks,
        "mean_union_over_blocks": unions.mean_over_blocks,
        "max_union_over_blocks": unions.max_over_blocks,
    }


def _windowing(call: ClusteredCall) -> tuple[tuple[str, int], ...]:
    if call.config.hierarchy is not None:
        return ()
    sizes = arguments.sizes_of(call.q, call.k, call.mask)
    plans = [chunk.plan for chunk in chunks_of(call.mask, sizes, call.config.block_size)]
    return (
        ("tiles_scored", sum(len(p.active_tiles) for p in plans)),
        ("tiles_skipped_future", sum(p.skipped_future_tiles for p in plans)),
        ("tiles_skipped_past", sum(p.skipped_past_tiles for p in plans)),
    )


def _looked_up(call: ClusteredCall, backend: str) -> str:
    tiles = (call.config.query_tile_size, call.config.block_size)
    key = exact_mask_key(call.mask, block_sizes=tiles, dtype=call.q.dtype, backend=backend)
    built: list[Any] = []  # the cache's own counts are changed by other threads too
    KERNELS.get(key, built.append)
    return "miss" if built else "hit"
