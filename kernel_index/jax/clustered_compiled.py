"""The compiled functions of ``kernel_index.jax.clustered_sparse_attention``, kept by what is static in a mask."""

import functools
from typing import Any

import jax
from jax import lax

from kernel_index.jax.attention_contract import AttentionCall
from kernel_index.jax.attention_pallas import attention_pallas
from kernel_index.jax.block_selection import select
from kernel_index.jax.clustered_contract import ClusteredCall
from kernel_index.jax.clustered_pallas import attend_selected
from kernel_index.jax.mask import MaskContract
from kernel_index.jax.mask_kernel_cache import MaskKernels, mask_of
from kernel_index.jax.reference import attention_with_lse_xla
from kernel_index.jax.target import is_interpreted
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey


def _build(key: ExactMaskKey) -> Any:
    """The compiled function of a key; it takes as arguments whatever may differ between two batches."""

    @functools.partial(jax.jit, static_argnames=("config", "scale", "softcap", "interpret"))
    def attend(
        q: Any, k: Any, v: Any, mask: MaskContract, *, config: Any, scale: Any, softcap: Any, interpret: Any
    ) -> tuple[jax.Array, jax.Array]:
        mask = mask_of(key, mask)
        call = ClusteredCall(q, k, v, config, mask, scale, softcap)
        return _xla(call) if key.backend == "xla" or q.size == 0 or k.size == 0 else _pallas(call, interpret)

    return attend


def _xla(call: ClusteredCall) -> tuple[jax.Array, jax.Array]:
    q, k, v, config = call.q, call.k, call.v, call.config
    bounds = call.mask.row_bounds(q.shape[0], q.shape[1], k.shape[1])
    how = {"scale": call.scale, "softcap": call.softcap}
    if call.reroute or q.size == 0 or k.size == 0:
        return attention_with_lse_xla(q, k, v, bounds, None, **how)
    selected = lax.stop_gradient(select(q, k, config, call.mask, "xla", False))
    return attention_with_lse_xla(q, k, v, bounds, selected, **how, block=config.block_size)


def _pallas(call: ClusteredCall, interpret: bool | None) -> tuple[jax.Array, jax.Array]:
    q, k, v, config = call.q, call.k, call.v, call.config
    if call.reroute:
        dense = AttentionCall(q, k, v, call.mask, call.scale, call.softcap, sink=None, block_sizes=None)
        return attention_pallas(dense, interpret=interpret)
    bounds = call.mask.intervals(q.shape[0], q.shape[1], k.shape[1])
    selected = lax.stop_gradient(select(q, k, config, call.mask, "pallas", interpret))
    how = {"scale": call.scale, "softcap": call.softcap, "interpret": interpret}
    sizes = {"block_size": config.block_size, "tile_size": config.query_tile_size}
    return attend_selected(q, k, v, selected, bounds, **sizes, **how)


KERNELS = MaskKernels("clustered_sparse_attention", _build)
"""The compiled functions of ``clustered_sparse_attention``, by static key, with their counters."""


def _key(backend: str, call: ClusteredCall) -> tuple:
    return call.mask, call.q.dtype, backend, (call.config.query_tile_size, call.config.block_size)


def is_cached(backend: str, call: ClusteredCall) -> bool:
    return KERNELS.has(*_key(backend, call))


def run_cached(backend: str, call: ClusteredCall) -> tuple[jax.Array, jax.Array]:
    """``out`` [B, T, H, Dv] and ``lse`` [B, H, T]."""
    attend = KERNELS.get(*_key(backend, call))
    how = {"scale": call.scale, "softcap": call.softcap, "interpret": is_interpreted(call.q)}
    return attend(call.q, call.k, call.v, call.mask, config=call.config, **how)
