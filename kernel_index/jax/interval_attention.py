"""``attention`` for JAX arrays: check, choose, run a kernel that is kept by what is static in the mask."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernel_index.core import checks as host
from kernel_index.core.dispatch import choose
from kernel_index.jax import checks
from kernel_index.jax.attention_backends import JAX_BACKENDS, mode_of
from kernel_index.jax.attention_pallas import attention_with_lse_pallas
from kernel_index.jax.cache import MaskKernels
from kernel_index.jax.mask import MaskContract, as_contract
from kernel_index.jax.reference import attention_with_lse_xla
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey

EVERYTHING_BEFORE = MaskContract()


class AttentionOutput(NamedTuple):
    """``out`` [B, T, H, Dv] in q's dtype; ``lse`` [B, H, T], natural logarithm, float32.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> q = jnp.zeros((1, 2, 1, 4))
    >>> [round(float(x), 4) for x in kij.attention_with_lse(q, q, q).lse[0, 0]]
    [0.0, 0.6931]
    """

    out: jax.Array
    lse: jax.Array


def check(q: Any, k: Any, v: Any, mask: MaskContract, scale: Any, softcap: Any, sink: Any, block_sizes: Any) -> None:
    for name, value, legend in (("q", q, "[B, T, H, D]"), ("k", k, "[B, S, K, D]"), ("v", v, "[B, S, K, Dv]")):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, legend)
        checks.has_dtype(name, value, q.dtype, "like q")
    batch, _, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    checks.has_shape("k", k, (batch, keys, kv_heads, width), "[B, S, K, D] with q's B and D,")
    checks.has_shape("v", v, (batch, keys, kv_heads, v.shape[3]), "[B, S, K, Dv] with k's B, S and K,")
    if width < 1:
        raise ValueError(f"q must be of head size at least 1, got shape {tuple(q.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must be of a multiple of k's {kv_heads} heads, got {heads}")
    mask.check_sizes(batch, keys)
    if scale is not None:
        host.is_real("scale", scale)
    host.is_real("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0 (0 is off), got {softcap}")
    if sink is not None:
        checks.is_floating("sink", sink)
        checks.has_shape("sink", sink, (heads,), "one logit for each query head, [H]")
    check_block_sizes(block_sizes)


def check_block_sizes(block_sizes: Any) -> None:
    if block_sizes is None:
        return
    if not isinstance(block_sizes, tuple) or len(block_sizes) != 2:
        raise ValueError(f"block_sizes must be a pair (queries, keys), got {block_sizes!r}")
    for i, size in enumerate(block_sizes):
        host.is_int(f"block_sizes[{i}]", size, minimum=1)
        if size % 8:
            raise ValueError(f"block_sizes[{i}] must be a multiple of 8, got {size}")


def _build(key: ExactMaskKey) -> Any:
    """The compiled function of a key; everything that a batch brings is an argument."""

    @functools.partial(jax.jit, static_argnames=("scale", "softcap", "interpret"))
    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: MaskContract,
        sink: Any,
        *,
        scale: Any,
        softcap: Any,
        interpret: Any,
    ) -> AttentionOutput:
        mask = MaskContract(key.causal, key.window, mask.doc_ids, mask.validity, mask.q_offset)
        if key.backend == "pallas":
            blocks = key.block_sizes
            how = {"scale": scale, "softcap": softcap, "block_sizes": blocks, "interpret": interpret}
            out, lse = attention_with_lse_pallas(q, k, v, mask, **how)
        else:
            bounds = mask.intervals(q.shape[0], q.shape[1], k.shape[1])
            out, lse = attention_with_lse_xla(q, k, v, bounds, None, scale=scale, softcap=softcap)
        return _with_sink(out, lse, sink)

    return attend


def _with_sink(out: jax.Array, lse: jax.Array, sink: jax.Array | None) -> AttentionOutput:
    """The sink takes its share of the denominator; a query without keys stays as it is."""
    if sink is None:
        return AttentionOutput(out, lse)
    empty = jnp.isneginf(lse)
    known = jnp.where(empty, 0.0, lse)
    logit = sink.astype(lse.dtype)[None, :, None]
    share = jax.nn.sigmoid(known - logit).swapaxes(1, 2)[..., None]
    joined = jnp.where(empty, -jnp.inf, jnp.logaddexp(known, logit))
    return AttentionOutput((out * share).astype(out.dtype), joined)


KERNELS = MaskKernels("attention", _build)
"""The compiled functions of ``attention``, by static key, with their counters."""


def is_cached(backend: str, q: jax.Array, mask: MaskContract, block_sizes: Any) -> bool:
    return KERNELS.has(mask, q.dtype, backend, block_sizes)


def run_cached(
    backend: str, q: Any, k: Any, v: Any, mask: MaskContract, scale: Any, softcap: Any, sink: Any, block_sizes: Any
) -> AttentionOutput:
    kernel = KERNELS.get(mask, q.dtype, backend, block_sizes)
    return kernel(q, k, v, mask, sink, scale=scale, softcap=softcap, interpret=mode_of(q) == "interpreted")


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
    backend: str = "auto",
) -> AttentionOutput:
    """``attention`` together with the logarithm of its denominator, as ``kernel_index.attention_with_lse`` has it.

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
    mask = as_contract(mask)
    check(q, k, v, mask, scale, softcap, sink, block_sizes)
    call = (q, k, v, mask, scale, softcap, sink, block_sizes)
    return choose("jax.attention_with_lse", JAX_BACKENDS, backend, *call).run(*call)


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
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention over the keys that the mask allows, for JAX arrays: ``kernel_index.attention`` once more.

    With G = H / K query heads for each key head and ``z = scale · q[t, h]·k[s, h // G]``, capped by
    ``softcap · tanh(z / softcap)`` where a softcap is given::

        out[t, h] = Σ_s exp(z[t, s]) · v[s, h // G] / (exp(sink[h]) + Σ_s exp(z[t, s]))      over allowed s

    On a TPU (``pallas``) no block of keys is fetched that no query of a tile may attend to: what to visit is planned
    inside jit, from arrays, so that one compilation serves every batch.  Works under ``jit``, ``vmap``, ``grad`` (once)
    and ``shard_map`` over batch or heads.  A query that may attend to nothing gives exactly 0 and gradient 0.

    Args:
        q: [B, T, H, D], any floating dtype (``pallas``: float32 or bfloat16).
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        mask: a ``MaskContract`` of this package, or torch's; causal by default.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        sink: [H], learnable logits that join the denominator and have no value; None for no such term.
        block_sizes: queries of a tile and keys of a block on ``pallas``, multiples of 8; None to let it choose.
        backend: ``"auto"``, ``"pallas"`` (compiled on a TPU, interpreted on a CPU) or ``"xla"``, the reference.

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
    mask = as_contract(mask)
    check(q, k, v, mask, scale, softcap, sink, block_sizes)
    call = (q, k, v, mask, scale, softcap, sink, block_sizes)
    return choose("jax.attention", JAX_BACKENDS, backend, *call).run(*call).out
