"""The compiled functions of ``kernel_index.jax.attention``, kept by what is static in a mask."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernel_index.jax.attention_contract import AttentionCall
from kernel_index.jax.attention_pallas import attention_pallas
from kernel_index.jax.mask import MaskContract
from kernel_index.jax.mask_kernel_cache import MaskKernels, mask_of
from kernel_index.jax.reference import attention_with_lse_xla
from kernel_index.jax.target import is_interpreted
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey


def _build(key: ExactMaskKey) -> Any:
    """The compiled function of a key; it takes as arguments whatever may differ between two batches."""

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
    ) -> tuple[jax.Array, jax.Array]:
        mask = mask_of(key, mask)
        if key.backend == "pallas":
            call = AttentionCall(q, k, v, mask, scale, softcap, sink, key.block_sizes)
            out, lse = attention_pallas(call, interpret=interpret)
        else:
            bounds = mask.row_bounds(q.shape[0], q.shape[1], k.shape[1])
            out, lse = attention_with_lse_xla(q, k, v, bounds, None, scale=scale, softcap=softcap)
        return (out, lse) if sink is None else with_sink(out, lse, sink)

    return attend


def with_sink(out: jax.Array, lse: jax.Array, sink: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add ``exp(sink)`` to each denominator; a query without keys stays as it is."""
    empty, dtype = jnp.isneginf(lse), out.dtype  # [B, H, T]
    known = jnp.where(empty, 0.0, lse)
    logit = sink.astype(lse.dtype)[None, :, None]  # [1, H, 1]
    factor = jax.nn.sigmoid(known - logit).swapaxes(1, 2)[..., None]  # [B, T, H, 1]
    joined = jnp.where(empty, -jnp.inf, jnp.logaddexp(known, logit))
    out = jnp.where(empty.swapaxes(1, 2)[..., None], 0, out * factor)  # no gradient of the sink where nothing is seen
    return out.astype(dtype), joined


KERNELS = MaskKernels("attention", _build)
"""The compiled functions of ``attention``, by static key, with their counters."""


def is_cached(backend: str, call: AttentionCall) -> bool:
    return KERNELS.has(call.mask, call.q.dtype, backend, call.block_sizes)


def run_cached(backend: str, call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """``out`` [B, T, H, Dv] and ``lse`` [B, H, T]."""
    attend = KERNELS.get(call.mask, call.q.dtype, backend, call.block_sizes)
    how = {"scale": call.scale, "softcap": call.softcap, "interpret": is_interpreted(call.q)}
    return attend(call.q, call.k, call.v, call.mask, call.sink, **how)
