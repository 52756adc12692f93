"""Argument checks that every decoding function shares: the queries of a step, a cache, and the new keys and values."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.core.autocast import autocast_dtype
from kernel_index.kvcache.cache import CacheLayer, KVCache

REQUIRES_APPEND_KV = "dense_fa4_kvcache_requires_append_kv"
CACHE_LEGEND = "[B, Tmax, K, D] or [pages, page, K, D]"


def check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Any, k: Any, v: Any, table: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` for metadata that does not fit, except the table's rank and rows."""
    if _is_usual_step(q, k_cache, v_cache, lengths, k, v, table):
        return
    for name, value, legend in (
        ("q", q, "[B, Lq, H, D]"),
        ("k_cache", k_cache, CACHE_LEGEND),
        ("v_cache", v_cache, CACHE_LEGEND),
    ):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, legend)
        checks.has_dtype(name, value, q.dtype, "like q")
        checks.on_device(name, value, q, "q")
    batch, _, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    checks.has_shape("k_cache", k_cache, (*k_cache.shape[:2], kv_heads, width), "of q's head size,")
    checks.has_shape("v_cache", v_cache, tuple(k_cache.shape), "of k_cache's shape")
    if width < 1:
        raise ValueError(f"q must be of head size at least 1, got shape {tuple(q.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must be of a multiple of k_cache's {kv_heads} heads, got {heads}")
    if k_cache.requires_grad or v_cache.requires_grad:
        raise ValueError("k_cache and v_cache must be without gradients: they are written in place, got requires_grad")
    _check_new(q, k, v, kv_heads)
    checks.is_integer_tensor("cache_seqlens", lengths)
    checks.has_shape("cache_seqlens", lengths, (batch,), "one length for each row of q, [B]")
    checks.on_device("cache_seqlens", lengths, q, "q")
    if table is None:
        checks.has_shape("k_cache", k_cache, (batch, *k_cache.shape[1:]), "of q's batch size where no table is given,")
    else:
        checks.is_integer_tensor("block_table", table)
        checks.on_device("block_table", table, q, "q")


def _is_usual_step(q: Any, k_cache: Any, v_cache: Any, lengths: Any, k: Any, v: Any, table: Any) -> bool:
    """Whether plain tensors fit together, all at once: asking one by one takes a quarter of an eager step's time.

    False says nothing; what it accepts, the questions of ``check_tensors`` accept.
    """
    others = (k_cache, v_cache, k, v)
    given = (q, lengths, *others) if table is None else (q, lengths, table, *others)
    if any(type(x) is not Tensor or x.layout != torch.strided for x in given) or any(x.ndim != 4 for x in (q, *others)):
        return False
    if k_cache.requires_grad or v_cache.requires_grad or lengths.dtype not in _INTEGERS:
        return False
    dtype, device, (batch, _, heads, width), kv_heads = q.dtype, q.device, q.shape, k_cache.shape[2]
    if not dtype.is_floating_point or any(x.dtype != dtype or x.device != device for x in others):
        return False
    if width < 1 or kv_heads < 1 or heads % kv_heads or lengths.shape != (batch,) or lengths.device != device:
        return False
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != width or k.shape != v.shape:
        return False
    if k.shape != (batch, k.shape[1], kv_heads, width):
        return False
    if table is None:
        return k_cache.shape[0] == batch
    return table.dtype in _INTEGERS and table.device == device


_INTEGERS = (torch.int32, torch.int64)


def cast_to_cache(k_cache: Any, *values: Any) -> tuple[Any, ...]:
    """Queries and new keys and values as autocast has them: in the dtype of the cache, which is written as it is.

    Where autocast is off, or never casts (float64), nothing changes.
    """
    if autocast_dtype(k_cache) is None:
        return values
    return tuple(value if autocast_dtype(value) is None else value.to(k_cache.dtype) for value in values)


def cast_result(out: Tensor) -> Tensor:
    """The result of a step of decoding, in autocast's dtype where it is on."""
    dtype = autocast_dtype(out)
    return out if dtype is None else out.to(dtype)


def _check_new(q: Tensor, k: Any, v: Any, kv_heads: int) -> None:
    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing} must be given where {given} is ({REQUIRES_APPEND_KV}), got None")
    if k is None:
        return
    for name, value in (("k", k), ("v", v)):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, "[B, Ln, K, D]")
        checks.has_dtype(name, value, q.dtype, "like q")
        checks.on_device(name, value, q, "q")
        legend = "[B, Ln, K, D] with q's B and D, and the heads of the cache,"
        checks.has_shape(name, value, (q.shape[0], k.shape[1], kv_heads, q.shape[3]), legend)


def layer_of(cache: Any, layer: Any) -> Any:
    """One layer's view of a cache that is given whole; anything else is left to ``check_layer``."""
    return cache.peek(layer) if isinstance(cache, KVCache) else cache


def check_layer(q: Tensor, cache: Any, k: Any, v: Any) -> None:
    """``check_tensors`` for a layer of a cache with an open step; k, where given, holds that step's tokens."""
    if not isinstance(cache, CacheLayer):
        raise TypeError(f"cache must be a KVCache or what its layer(index) returns, got {type(cache).__name__}")
    caches = cache["k_cache"], cache["v_cache"]
    check_tensors(q, *caches, cache["cache_seqlens"], k, v, cache["block_table"])
    if k is not None and k.shape[1] != cache.new_tokens:
        raise ValueError(f"k must be of the {cache.new_tokens} new tokens of this step, got {k.shape[1]}")


def triton_decode_why_not(q: Tensor, k: Tensor | None, v: Tensor | None, *cached: Tensor | None) -> str | None:
    """The rules of every Triton kernel that decodes: ``cached`` are the tensors that it reads beside q."""
    if (rule := rules.triton_why_not(q, *cached)) is not None:
        return rule
    if rules.wants_gradient(q, k, v):
        return rules.NO_BACKWARD
    if q.shape[-1] > rules.WIDEST_HEAD:
        return "takes head sizes up to 256"
    return None
