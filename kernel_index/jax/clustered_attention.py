"""``clustered_sparse_attention`` for JAX arrays."""

from typing import Any, Literal

import jax

from kernel_index.core.dispatch import choose
from kernel_index.jax.block_selection import select_compiled
from kernel_index.jax.clustered_backends import JAX_BACKENDS
from kernel_index.jax.clustered_contract import check
from kernel_index.jax.interval_attention import AttentionOutput
from kernel_index.jax.mask import EVERYTHING_BEFORE
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig

JaxClusteredBackend = Literal["auto", "pallas", "xla"]


def clustered_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: ClusteredSparseConfig,
    mask: Any = EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: JaxClusteredBackend = "auto",
) -> jax.Array:
    """Attention of each query to the blocks that score best for it: ``kernel_index.clustered_sparse_attention`` in JAX.

    Three phases.  Blocks are scored by their mean key against the mean query of a group of heads, and the best ``topk``
    are selected for each query, the current block among them.  The blocks selected for a tile of neighbouring queries
    are united.  Attention walks over the unions, where each query attends to its selected blocks alone, as far as the
    mask allows::

        allowed(t, s) = s // block_size ∈ selected[t]  and  the mask allows s for t
        out[t, h] = Σ_s exp(z[t, s]) · v[s] / Σ_s exp(z[t, s])       z as in ``attention``, over the allowed s

    The selection has no gradient; attention is differentiable in q, k and v, once.  Works under ``jit``, ``vmap``,
    ``grad`` and ``shard_map`` over batch or heads.  Where ``topk`` covers all blocks it is ``attention``.  It has no
    ``sink``, which the function of PyTorch takes.

    Args:
        q: [B, T, H, D]; ``pallas``: float32 or bfloat16.
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        config: a ``ClusteredSparseConfig``, the same as torch's; ``dense_above`` is ignored: the size of a union
            cannot be read inside jit, and a walk over all blocks costs as much as a dense one.
        mask: a causal ``MaskContract`` of this package, or torch's, without a prefix tree, a ``prefix`` and a
            ``q_offset`` of rows.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        backend: ``"auto"``, ``"pallas"`` (compiled on a TPU, interpreted on a CPU) or ``"xla"``, the reference.  Inside
            jit the platform that the program is lowered for decides how ``pallas`` runs; ``"auto"`` cannot know it and
            goes by JAX's default backend.

    Returns:
        [B, T, H, Dv] in q's dtype.

    Raises:
        TypeError: an array is not floating, dtypes differ, or mask or config are of the wrong type.
        ValueError: shapes, heads, sizes or options do not fit, or the mask is not one of those above.
        Ineligible: the named backend cannot run this call.

    Source: Yuan et al., "Native Sparse Attention", 2025; Lu et al., "MoBA", 2025.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> q = jnp.ones((1, 4, 1, 8))
    >>> v = q * jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> config = kij.ClusteredSparseConfig(block_size=1, topk=2)
    >>> kij.clustered_sparse_attention(q, q, v, config=config)[0, :, 0, 0].tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    call = check(q, k, v, config, mask, scale, softcap)
    out, _ = choose("jax.clustered_sparse_attention", JAX_BACKENDS, backend, call).run(call)
    return out


def clustered_sparse_attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: ClusteredSparseConfig,
    mask: Any = EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: JaxClusteredBackend = "auto",
) -> AttentionOutput:
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
    call = check(q, k, v, config, mask, scale, softcap)
    return AttentionOutput(*choose("jax.clustered_sparse_attention_with_lse", JAX_BACKENDS, backend, call).run(call))


def clustered_route(
    q: jax.Array, k: jax.Array, *, config: ClusteredSparseConfig, mask: Any = EVERYTHING_BEFORE
) -> jax.Array:
    """The blocks that ``clustered_sparse_attention`` selects, int32 [B, T, K, n] with ``n = min(topk, blocks)``.

    Ascending; −1 follows where fewer are selected for a query.

    Args:
        q: [B, T, H, D], and the others as in ``clustered_sparse_attention``.

    Returns:
        The blocks that ``xla`` selects; those of ``pallas`` differ only where two scores differ by rounding.

    Raises:
        TypeError, ValueError: as ``clustered_sparse_attention``.

    Source: as ``clustered_sparse_attention``.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> x = jnp.ones((1, 6, 1, 4))
    >>> kij.clustered_route(x, x, config=kij.ClusteredSparseConfig(block_size=2, topk=1)).ravel().tolist()
    [0, 0, 1, 1, 2, 2]
    """
    call = check(q, k, k, config, mask, None, 0.0)
    return select_compiled(q, k, config, call.mask, "xla", False)
