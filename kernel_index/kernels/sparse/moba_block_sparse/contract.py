"""Argument checks and backend eligibility of ``moba_attention``, ``moba_route`` and ``moba_decode``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, native, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseCall
from kernel_index.kernels.sparse.moba_block_sparse.backend_aliases import flash_runtime_why_not
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.decode_arguments import cast_to_cache, check_layer, triton_decode_why_not
from kernel_index.masks import attention_arguments as arguments
from kernel_index.masks.doc_window_mask.contract import Window, normalize_window
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.block_router.contract import details as router_details
from kernel_index.routing.legal_blocks import check_causal, num_blocks, without_empty_end

ROUTES = ("query_head", "kv_group")


class MobaCall(NamedTuple):
    """One checked call of ``moba_attention``, with ``groups`` selections for each query."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor  # [B, S, K, Dv]
    block_size: int
    topk: int
    mask: MaskContract
    groups: int  # G: H or K
    scale: float | None
    softcap: float
    query_tile_size: int
    sink: Tensor | None  # [H]
    with_lse: bool

    @property
    def routing(self) -> RouterCall:
        return RouterCall(self.q, self.k, self.block_size, self.topk, self.mask, self.groups)

    def on_core(self, selected: Tensor, selected_valid: Tensor | None) -> BlockSparseCall:
        """The call of the block-sparse core that attends to these blocks."""
        return BlockSparseCall(
            self.q,
            self.k,
            self.v,
            selected,
            selected_valid,
            self.block_size,
            self.mask,
            self.scale,
            self.softcap,
            self.query_tile_size,
            None,
            self.sink,
        )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int,
    mask: MaskContract,
    route_per: str,
    scale: float | None,
    softcap: float,
    query_tile_size: int,
    sink: Tensor | None = None,
    *,
    with_lse: bool = False,
) -> MobaCall:
    q, k, v = cast_like_sdpa(q, k, v)
    arguments.check_attention(q, k, v, mask, scale, softcap, sink)
    check_causal(mask)
    _check_router(q, block_size, topk, route_per)
    checks.is_int("query_tile_size", query_tile_size, minimum=1)
    groups = groups_of(q.shape[2], k.shape[2], route_per)
    block_size = without_empty_end(block_size, k.shape[1])
    return MobaCall(q, k, v, block_size, topk, mask, groups, scale, softcap, query_tile_size, sink, with_lse)


def check_route(q: Tensor, k: Tensor, block_size: int, topk: int, mask: MaskContract, route_per: str) -> RouterCall:
    return check(q, k, k, block_size, topk, mask, route_per, None, 0.0, 1).routing


def _check_router(q: Tensor, block_size: Any, topk: Any, route_per: Any) -> None:
    if q.shape[2] < 1:
        raise ValueError(f"q must be of at least one head, got shape {tuple(q.shape)}")
    checks.is_int("block_size", block_size, minimum=1)
    checks.is_int("topk", topk, minimum=1)
    checks.one_of("route_per", route_per, ROUTES)


class MobaDecodeCall(NamedTuple):
    """A checked call of ``moba_decode``: one layer of a cache, ``groups`` selections for each query."""

    q: Tensor
    cache: CacheLayer
    k: Tensor | None
    v: Tensor | None
    block_size: int
    topk: int
    window: Window
    groups: int
    scale: float
    softcap: float
    sink: Tensor | None


def check_decode(
    q: Tensor,
    cache: Any,
    k: Tensor | None,
    v: Tensor | None,
    block_size: int,
    topk: int,
    window_size: Any,
    route_per: str,
    scale: float | None,
    softcap: float,
    sink: Tensor | None = None,
) -> MobaDecodeCall:
    if isinstance(cache, CacheLayer):
        q, k, v = cast_to_cache(cache["k_cache"], q, k, v)
    check_layer(q, cache, k, v)
    if k is None and cache.new_tokens:
        raise ValueError(f"k must be of the {cache.new_tokens} new tokens of this step, got 0")
    arguments.check_scoring(scale, softcap)
    arguments.check_sink(sink, q)
    _check_router(q, block_size, topk, route_per)
    window, groups = normalize_window(window_size), groups_of(q.shape[2], cache["k_cache"].shape[2], route_per)
    factor = arguments.scale_of(q, scale)
    return MobaDecodeCall(q, cache, k, v, block_size, topk, window, groups, factor, softcap, sink)


def groups_of(heads: int, kv_heads: int, route_per: str) -> int:
    return heads if route_per == "query_head" else kv_heads


def decode_reference_why_not(call: MobaDecodeCall) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: KV-cache bookkeeping is on the host"
    return None


def decode_cpu_why_not(call: MobaDecodeCall) -> str | None:
    if (rule := decode_reference_why_not(call)) is not None:
        return rule
    if not call.q.is_cpu:
        return rules.NEEDS_CPU
    if not rules.host_readable(call.q):
        return "inside a transform or a dispatch mode"
    if rules.wants_gradient(call.q, call.k, call.v, call.sink):
        return rules.NO_BACKWARD
    return None


def decode_native_why_not(call: MobaDecodeCall) -> str | None:
    if (rule := decode_cpu_why_not(call)) is not None:
        return rule
    return native.why_not(call.q, call.cache["k_cache"], call.cache["v_cache"])


def decode_triton_why_not(call: MobaDecodeCall) -> str | None:
    if (rule := decode_reference_why_not(call)) is not None:
        return rule
    if rules.wants_gradient(call.sink):
        return rules.NO_BACKWARD
    return triton_decode_why_not(call.q, call.k, call.v, call.cache["k_cache"], call.cache["v_cache"], call.sink)


def decode_triton_not_worth(call: MobaDecodeCall) -> str | None:
    return rules.triton_not_worth(call.q)


def decode_details(call: MobaDecodeCall) -> tuple[tuple[str, Any], ...]:
    """Known on the host; ``density`` is the share of the longest row's blocks that a query attends to."""
    blocks = num_blocks(max(call.cache.lengths_after, default=0), call.block_size)
    picks = min(call.topk, blocks)
    return ("blocks", blocks), ("picks", picks), ("density", picks / blocks if blocks else 0.0)


def core_why_not(rule: Callable[..., str | None], call: MobaCall) -> str | None:
    """A rule of the block-sparse core before there is a selection: a rule reads its shape and device alone."""
    stand_in = torch.empty((), dtype=torch.int32, device=call.q.device)
    shape = (*call.q.shape[:2], call.groups, call.routing.selected)
    return rule(call.on_core(stand_in.expand(shape), None))


def details(call: MobaCall) -> tuple[tuple[str, Any], ...]:
    """The share of blocks that a query selects at most; only a count can tell how many it shares with others."""
    return router_details(call.routing)


def flash_why_not(call: MobaCall) -> str | None:
    q, k, v = call.q, call.k, call.v
    if (rule := flash_runtime_why_not(q)) is not None:
        return rule
    if call.sink is not None or call.with_lse:
        return "FlexAttention's flash kernels are called for the output alone, without a sink"
    if rules.inside_functorch():
        return rules.INSIDE_FUNCTORCH
    if q.dtype not in rules.HALF:
        return "flash-attn-4 takes float16 and bfloat16"
    if q.shape[3] != v.shape[3] or not 16 <= q.shape[3] <= rules.WIDEST_HEAD:
        return "needs one head size from 16 to 256"
    if q.shape[0] * q.shape[1] * k.shape[1] == 0:
        return "needs at least one query and one key"
    return None
