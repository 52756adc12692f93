"""``clustered_sparse_attention`` for JAX arrays."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index import checks as host
from kernel_index.attention.dense_attention.jax_backends import mode_of
from kernel_index.attention.dense_attention.pallas import attention_with_lse_pallas
from kernel_index.dispatch import choose
from kernel_index.jax import interval_attention, routing
from kernel_index.jax.cache import MaskKernels
from kernel_index.jax.mask import MaskContract, as_contract
from kernel_index.jax.reference import attention_with_lse_xla
from kernel_index.sparse.clustered_sparse_three_phase import pallas
from kernel_index.sparse.clustered_sparse_three_phase.jax_backends import JAX_BACKENDS, reroute_of
from kernel_index.sparse.exact_mask_contract_cache.key import ExactMaskKey

MODES = ("auto", "bitmap", "sort")


@dataclass(frozen=True)
class ClusteredSparseConfig:
    """How clustered sparse attention picks: static, so that it may be a key.

    Args:
        block_size: keys of a block.
        topk: blocks for each query, the one that holds it counted.
        query_tile_size: neighbouring queries that share the union of their picks.
        hierarchy: ``(ratio, topc)`` to pick among the children of the ``topc`` best groups of ``ratio`` blocks; None
            to score all blocks.
        fused_scoring: pick in the kernel that scores, where there is one.
        union_mode: ``"auto"``, ``"bitmap"`` or ``"sort"``; all give the same.
        dense_above: share of the blocks in a union above which the sparse walk does not pay; None for the default.

    >>> import kernel_index.jax as kij
    >>> kij.ClusteredSparseConfig(topk=4).block_size
    64
    """

    block_size: int = 64
    topk: int = 16
    query_tile_size: int = 64
    hierarchy: Any = None
    fused_scoring: bool = True
    union_mode: str = "auto"
    dense_above: float | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "topk", "query_tile_size"):
            host.is_int(name, getattr(self, name), minimum=1)
        host.is_bool("fused_scoring", self.fused_scoring)
        host.one_of("union_mode", self.union_mode, MODES)


def hierarchy_of(config: Any) -> tuple[int, int] | None:
    """``(ratio, topc)`` of a pair, or of an object with ``coarse_ratio`` and ``coarse_topc``."""
    given = config.hierarchy
    if given is None:
        return None
    pair = given if isinstance(given, tuple | list) else (given.coarse_ratio, given.coarse_topc)
    if len(pair) != 2:
        raise ValueError(f"hierarchy must be a pair (ratio, topc), got {given!r}")
    for i, size in enumerate(pair):
        host.is_int(f"hierarchy[{i}]", size, minimum=1)
    return int(pair[0]), int(pair[1])


def check(q: Any, k: Any, v: Any, config: Any, mask: MaskContract, scale: Any, softcap: Any) -> None:
    interval_attention.check(q, k, v, mask, scale, softcap, None, None)
    missing = [n for n in ClusteredSparseConfig.__dataclass_fields__ if not hasattr(config, n)]
    if missing:
        raise TypeError(f"config must be a ClusteredSparseConfig, got {type(config).__name__}")
    hierarchy_of(config)
    routing.check_causal(mask)


def select(q: Any, k: Any, config: Any, mask: MaskContract, backend: str, interpret: bool) -> jax.Array:
    """Phase 1: the blocks that each query picks, int32 [B, T, K, topk], ascending, −1 behind; no gradient."""
    batch, queries = q.shape[:2]
    keys, kv_heads = k.shape[1:3]
    block, hierarchy = config.block_size, hierarchy_of(config)
    legal = routing.legal_blocks(mask, batch, queries, keys, block)
    means = routing.block_means(k, block, mask)
    mean_queries = routing.group_queries(q, kv_heads)
    operands = (mean_queries, means, legal, pallas.chunk_ends(mask, queries, keys), block)
    if backend == "pallas" and config.fused_scoring and hierarchy is None:
        return pallas.pick_fused(*operands, config.topk, interpret)
    if backend == "pallas":
        scores = pallas.score_blocks(*operands, interpret)
    else:
        scores = jnp.einsum("btkd,bnkd->btkn", mean_queries, means, precision=lax.Precision.HIGHEST)
    if hierarchy is None:
        return routing.top_blocks(scores, legal, config.topk)
    return routing.expanded_blocks(scores, legal, config.topk, *hierarchy)


def _build(key: ExactMaskKey) -> Any:
    """The compiled function of a key; everything that a batch brings is an argument."""

    @functools.partial(jax.jit, static_argnames=("config", "scale", "softcap", "interpret"))
    def attend(
        q: Any, k: Any, v: Any, mask: MaskContract, *, config: Any, scale: Any, softcap: Any, interpret: Any
    ) -> Any:
        mask = MaskContract(key.causal, key.window, mask.doc_ids, mask.validity, mask.q_offset)
        batch, queries = q.shape[:2]
        how = {"scale": scale, "softcap": softcap}
        bounds = mask.intervals(batch, queries, k.shape[1])
        if q.size == 0 or k.size == 0:
            return attention_with_lse_xla(q, k, v, bounds, None, **how)
        if reroute_of(k, config):
            if key.backend == "xla":
                return attention_with_lse_xla(q, k, v, bounds, None, **how)
            return attention_with_lse_pallas(q, k, v, mask, **how, block_sizes=None, interpret=interpret)
        picked = lax.stop_gradient(select(q, k, config, mask, key.backend, interpret))
        if key.backend == "xla":
            return attention_with_lse_xla(q, k, v, bounds, picked, **how, block=config.block_size)
        sizes = {"block_size": config.block_size, "tile_size": config.query_tile_size}
        return pallas.attend_selected(q, k, v, picked, bounds, **sizes, **how, interpret=interpret)

    return attend


KERNELS = MaskKernels("clustered_sparse_attention", _build)
"""The compiled functions of ``clustered_sparse_attention``, by static key, with their counters."""


def _key(backend: str, q: Any, config: Any, mask: MaskContract) -> tuple:
    return mask, q.dtype, backend, (config.query_tile_size, config.block_size)


def is_cached(backend: str, q: Any, config: Any, mask: MaskContract) -> bool:
    return KERNELS.has(*_key(backend, q, config, mask))


def run_cached(backend: str, q: Any, k: Any, v: Any, config: Any, mask: MaskContract, scale: Any, softcap: Any) -> Any:
    kernel = KERNELS.get(*_key(backend, q, config, mask))
    interpret = mode_of(q) == "interpreted"
    return kernel(q, k, v, mask, config=config, scale=scale, softcap=softcap, interpret=interpret)


def clustered_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: Any,
    mask: Any = interval_attention.EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
) -> jax.Array:
    """Attention of each query to the blocks that score best for it: ``kernel_index.clustered_sparse_attention`` in JAX.

    Three phases.  Blocks are scored by their mean key against the mean query of a group of heads, and each query takes
    the best ``topk``, the block that holds it among them; tiles of neighbouring queries join their picks; attention
    walks over the unions, each query to its own picks and to what the mask allows::

        allowed(t, s) = s // block_size ∈ picks[t]  and  the mask allows s for t
        out[t, h] = Σ_s exp(z[t, s]) · v[s] / Σ_s exp(z[t, s])       z as in ``attention``, over the allowed s

    Picking is without gradient; attention is differentiable in q, k and v, once.  Works under ``jit``, ``vmap``,
    ``grad`` and ``shard_map`` over batch or heads.  Where ``topk`` covers all blocks it is ``attention``.

    Args:
        q: [B, T, H, D]; ``pallas``: float32 or bfloat16.
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        config: a ``ClusteredSparseConfig``, of this package or of torch's.
        mask: a causal ``MaskContract`` of this package, or torch's.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        backend: ``"auto"``, ``"pallas"`` (compiled on a TPU, interpreted on a CPU) or ``"xla"``, the reference.

    Returns:
        [B, T, H, Dv] in q's dtype.

    Raises:
        TypeError: an array is not floating, dtypes differ, or mask or config are of the wrong type.
        ValueError: shapes, heads, sizes or options do not fit, or the mask is not causal.
        Ineligible: the named backend cannot run this call.

    Source: Yuan et al., "Native Sparse Attention", 2025; Lu et al., "MoBA", 2025.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> q = jnp.ones((1, 4, 1, 8))
    >>> v = q * jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> config = kij.ClusteredSparseConfig(block_size=1, topk=2)
    >>> kij.clustered_sparse_attention(q, q, v, config=config)[0, :, 0, 0].tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    mask = as_contract(mask)
    check(q, k, v, config, mask, scale, softcap)
    call = (q, k, v, config, mask, scale, softcap)
    return choose("jax.clustered_sparse_attention", JAX_BACKENDS, backend, *call).run(*call)[0]
