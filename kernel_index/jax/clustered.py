"""``clustered_sparse_attention`` for JAX arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.core.dispatch import choose
from kernel_index.jax import clustered_pallas as pallas
from kernel_index.jax import interval_attention, routing
from kernel_index.jax.attention_backends import mode_of
from kernel_index.jax.attention_pallas import attention_with_lse_pallas
from kernel_index.jax.cache import MaskKernels
from kernel_index.jax.clustered_backends import JAX_BACKENDS, reroute_of
from kernel_index.jax.mask import MaskContract, as_contract
from kernel_index.jax.reference import attention_with_lse_xla
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey


def check(q: Any, k: Any, v: Any, config: Any, mask: MaskContract, scale: Any, softcap: Any) -> None:
    interval_attention.check(q, k, v, mask, scale, softcap, None, None)
    if not isinstance(config, ClusteredSparseConfig):
        raise TypeError(f"config must be a ClusteredSparseConfig, got {type(config).__name__}")
    routing.check_causal(mask)


def select(q: Any, k: Any, config: Any, mask: MaskContract, backend: str, interpret: bool) -> jax.Array:
    """Phase 1: the blocks that each query picks, int32 [B, T, K, n], ascending, −1 behind; no gradient."""
    batch, queries = q.shape[:2]
    keys, kv_heads = k.shape[1:3]
    block, hierarchy, topk = (
        config.block_size,
        config.hierarchy,
        min(config.topk, routing.num_blocks(keys, config.block_size)),
    )
    legal = routing.legal_blocks(mask, batch, queries, keys, block)
    means = routing.block_means(k, block, mask)
    mean_queries = routing.group_queries(q, kv_heads)
    operands = (mean_queries, means, legal, pallas.chunk_ends(mask, queries, keys), block)
    if backend == "pallas" and config.fused_scoring and hierarchy is None:
        return pallas.pick_fused(*operands, topk, interpret)
    if backend == "pallas":
        scores = pallas.score_blocks(*operands, interpret)
    else:
        scores = jnp.einsum("btkd,bnkd->btkn", mean_queries, means, precision=lax.Precision.HIGHEST)
    if hierarchy is None:
        return routing.top_blocks(scores, legal, topk)
    return routing.expanded_blocks(scores, legal, topk, *hierarchy)


_route = jax.jit(select, static_argnames=("config", "backend", "interpret"))


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
    config: ClusteredSparseConfig,
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
        config: a ``ClusteredSparseConfig``, the same as torch's; ``dense_above`` is not looked at: inside jit nobody
            can wait for a union's size, and a walk over all blocks costs what a dense one does.
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


def clustered_sparse_attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: ClusteredSparseConfig,
    mask: Any = interval_attention.EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
) -> interval_attention.AttentionOutput:
    """``clustered_sparse_attention`` together with the log-sum-exp of each query's scores.

    Args:
        q: as in ``clustered_sparse_attention``, and so are the others.

    Returns:
        ``AttentionOutput(out [B, T, H, Dv], lse [B, H, T])``; both carry gradients.  −inf where nothing is attended.

    Raises:
        TypeError, ValueError, Ineligible: as ``clustered_sparse_attention``.

    Source: as ``clustered_sparse_attention``.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> x, config = jnp.zeros((1, 4, 1, 8)), kij.ClusteredSparseConfig(block_size=2, topk=1)
    >>> jnp.exp(kij.clustered_sparse_attention_with_lse(x, x, x, config=config).lse).tolist()
    [[[1.0, 2.0, 1.0, 2.0]]]
    """
    mask = as_contract(mask)
    check(q, k, v, config, mask, scale, softcap)
    call = (q, k, v, config, mask, scale, softcap)
    out, lse = choose("jax.clustered_sparse_attention_with_lse", JAX_BACKENDS, backend, *call).run(*call)
    return interval_attention.AttentionOutput(out, lse)


def clustered_route(
    q: jax.Array, k: jax.Array, *, config: ClusteredSparseConfig, mask: Any = interval_attention.EVERYTHING_BEFORE
) -> jax.Array:
    """The blocks that ``clustered_sparse_attention`` picks, int32 [B, T, K, n] with ``n = min(topk, blocks)``.

    Ascending, −1 behind where a query has fewer.

    Args:
        q: [B, T, H, D], and the others as in ``clustered_sparse_attention``.

    Returns:
        The picks of the ``xla`` backend; those of ``pallas`` differ only where two scores differ by rounding.

    Raises:
        TypeError, ValueError: as ``clustered_sparse_attention``.

    Source: as ``clustered_sparse_attention``.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> x = jnp.ones((1, 6, 1, 4))
    >>> kij.clustered_route(x, x, config=kij.ClusteredSparseConfig(block_size=2, topk=1)).ravel().tolist()
    [0, 0, 1, 1, 2, 2]
    """
    mask = as_contract(mask)
    check(q, k, k, config, mask, None, 0.0)
    return _route(q, k, config, mask, "xla", False)
