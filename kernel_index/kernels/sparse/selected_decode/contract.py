"""Argument checks and backend eligibility of ``selected_decode``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, native, rules
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.decode_arguments import cast_to_cache, check_layer, triton_decode_why_not
from kernel_index.masks.attention_arguments import check_scoring, scale_of
from kernel_index.masks.doc_window_mask.contract import Window, normalize_window


class SelectedDecodeCall(NamedTuple):
    """A checked call: one layer of a cache; ``indices`` [B, Lq, G, n] with G = 1 for all heads, or K."""

    q: Tensor
    cache: CacheLayer
    indices: Tensor
    k: Tensor | None
    v: Tensor | None
    block_size: int
    window: Window
    scale: float
    softcap: float

    @property
    def blocks(self) -> int:
        """Blocks of the longest row, this step's tokens included."""
        return -(-max(self.cache.lengths_after, default=0) // self.block_size)


def check(
    q: Tensor,
    cache: Any,
    indices: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    block_size: int,
    window_size: Any,
    scale: float | None,
    softcap: float,
) -> SelectedDecodeCall:
    if isinstance(cache, CacheLayer):
        q, k, v = cast_to_cache(cache["k_cache"], q, k, v)
    check_layer(q, cache, k, v)
    if q.shape[2] < 1:
        raise ValueError(f"q must be of at least one head, got shape {tuple(q.shape)}")
    check_scoring(scale, softcap)
    checks.is_int("block_size", block_size, minimum=1)
    window = normalize_window(window_size)
    grouped = _check_indices(indices, q, cache["k_cache"].shape[2])
    call = SelectedDecodeCall(q, cache, grouped, k, v, block_size, window, scale_of(q, scale), softcap)
    _check_values(call)
    return call


def _check_indices(indices: Any, q: Tensor, kv_heads: int) -> Tensor:
    """The indices as [B, Lq, G, n]."""
    checks.is_tensor("indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}")
    checks.on_device("indices", indices, q, "q")
    batch, queries = q.shape[:2]
    if indices.ndim == 4:
        legend = "[B, Lq, K, n] with q's B and Lq and the cache's K,"
        checks.has_shape("indices", indices, (batch, queries, kv_heads, indices.shape[3]), legend)
        return indices
    checks.has_rank("indices", indices, 3, "[B, Lq, K, n] or [B, Lq, n]")
    checks.has_shape("indices", indices, (batch, queries, indices.shape[2]), "[B, Lq, n] with q's B and Lq,")
    return indices[:, :, None]


def _check_values(call: SelectedDecodeCall) -> None:
    """Only on the host; on a device an index out of range selects nothing."""
    indices = call.indices
    if not rules.host_readable(indices) or indices.numel() == 0:
        return
    blocks = call.blocks
    low, high = (int(x) for x in indices.aminmax())
    if low < -1 or high >= blocks:
        raise ValueError(f"indices must be below {blocks}, or -1 for none, got {low if low < -1 else high}")


def reference_why_not(call: SelectedDecodeCall) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: KV-cache bookkeeping is on the host"
    return None


def triton_why_not(call: SelectedDecodeCall) -> str | None:
    if (rule := reference_why_not(call)) is not None:
        return rule
    cached = (call.cache["k_cache"], call.cache["v_cache"], call.indices)
    return triton_decode_why_not(call.q, call.k, call.v, *cached)


def triton_not_worth(call: SelectedDecodeCall) -> str | None:
    return rules.triton_not_worth(call.q)


def native_why_not(call: SelectedDecodeCall) -> str | None:
    if (rule := reference_why_not(call)) is not None:
        return rule
    if not call.q.is_cpu:
        return rules.NEEDS_CPU
    if not rules.host_readable(call.q, call.indices):
        return "inside a transform or a dispatch mode"
    if rules.wants_gradient(call.q, call.k, call.v):
        return rules.NO_BACKWARD
    return native.why_not(call.q, call.cache["k_cache"], call.cache["v_cache"])


def sdpa_why_not(call: SelectedDecodeCall) -> str | None:
    if (rule := reference_why_not(call)) is not None:
        return rule
    if rules.inside_functorch():
        return rules.INSIDE_FUNCTORCH
    if rules.wants_gradient(call.q, call.k, call.v):
        return rules.NO_BACKWARD
    return "scaled_dot_product_attention has no softcap" if call.softcap != 0 else None


def details(call: SelectedDecodeCall) -> tuple[tuple[str, Any], ...]:
    """Known on the host; ``density`` is the largest share of the longest row's blocks that a query attends to."""
    selected = min(call.indices.shape[3], call.blocks)
    density = selected / call.blocks if call.blocks else 0.0
    return ("blocks", call.blocks), ("selected", selected), ("density", density)
