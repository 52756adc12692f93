"""``attention`` for JAX arrays."""

from typing import Any, Literal, NamedTuple

import jax

from kernel_index.core.dispatch import choose
from kernel_index.jax.attention_backends import JAX_BACKENDS
from kernel_index.jax.attention_contract import check
from kernel_index.jax.mask import EVERYTHING_BEFORE

JaxAttentionBackend = Literal["auto", "pallas", "xla"]


class AttentionOutput(NamedTuple):
    """``out`` [B, T, H, Dv] in q's dtype; ``lse`` [B, H, T], natural logarithm, float32.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> q = jnp.zeros((1, 2, 1, 4))
    >>> [round(float(x), 4) for x in kij.attention_with_lse(q, q, q).lse[0, 0]]
    [0.0, 0.6931]
    """

    out: jax.Array
    lse: jax.Array


def attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Any = EVERYTHING_BEFORE,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: jax.Array | None = None,
    block_sizes: tuple[int, int] | None = None,
    backend: JaxAttentionBackend = "auto",
) -> AttentionOutput:
    """``attention`` and the log-sum-exp of each query's scores; the same as ``kernel_index.attention_with_lse``.

    Args:
        q: as in ``attention``, and so are the others.

    Returns:
        ``AttentionOutput(out [B, T, H, Dv], lse [B, H, T])``; both carry gradients.

    Raises:
        TypeError, ValueError, Ineligible: as ``attention``.

    Source: as ``attention``.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> q = jnp.zeros((1, 3, 1, 8))
    >>> jnp.exp(kij.attention_with_lse(q, q, q).lse).round().tolist()
    [[[1.0, 2.0, 3.0]]]
    """
    call = check(q, k, v, mask, scale, softcap, sink, block_sizes)
    return AttentionOutput(*choose("jax.attention_with_lse", JAX_BACKENDS, backend, call).run(call))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Any = EVERYTHING_BEFORE,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: jax.Array | None = None,
    block_sizes: tuple[int, int] | None = None,
    backend: JaxAttentionBackend = "auto",
) -> jax.Array:
    """Softmax attention over the keys that the mask allows, for JAX arrays; the same as ``kernel_index.attention``.

    With G = H / K query heads for each KV head and ``z = scale · q[t, h]·k[s, h // G]``, capped by
    ``softcap · tanh(z / softcap)`` where a softcap is given::

        out[t, h] = Σ_s exp(z[t, s]) · v[s, h // G] / (exp(sink[h]) + Σ_s exp(z[t, s]))      over allowed s

    On a TPU (``pallas``) a tile of queries fetches only blocks of keys that one of its queries may attend to; in a
    prefix tree, the blocks of its path and few others.  The plan is made inside jit, from arrays, so that one
    compilation serves every batch.  Works under ``jit``, ``vmap``,
    ``grad`` (once) and ``shard_map`` over batch or heads.  A query that may attend to nothing gives exactly 0 and
    gradient 0.

    Args:
        q: [B, T, H, D], any floating dtype (``pallas``: float32 or bfloat16).
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        mask: a ``MaskContract`` of this package, or torch's; causal by default.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        sink: [H], learnable sink logits, which join the denominator and have no value; None for no such term.
        block_sizes: queries of a tile and keys of a block on ``pallas``, multiples of 8; None to let it choose.
        backend: ``"auto"``, ``"pallas"`` (compiled on a TPU, interpreted on a CPU) or ``"xla"``, the reference.  Inside
            jit the platform that the program is lowered for decides how ``pallas`` runs; ``"auto"`` cannot know it and
            goes by JAX's default backend.

    Returns:
        [B, T, H, Dv] in q's dtype.

    Raises:
        TypeError: an array is not floating, dtypes differ, or ``mask`` is not a ``MaskContract``.
        ValueError: shapes, heads or the mask's sizes do not fit, or softcap is negative.
        Ineligible: the named backend cannot run this call.

    Source: Vaswani et al., 2017; Dao, "FlashAttention-2", 2023.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> q, k = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 2, 8))
    >>> v = k * jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> kij.attention(q, k, v)[0, :, 0, 0].tolist()
    [1.0, 2.0]
    """
    call = check(q, k, v, mask, scale, softcap, sink, block_sizes)
    out, _ = choose("jax.attention", JAX_BACKENDS, backend, call).run(call)
    return out
