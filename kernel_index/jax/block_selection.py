"""Phase 1 of clustered sparse attention for JAX arrays: which blocks are selected for each query."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.jax import block_selection_pallas as pallas
from kernel_index.jax import routing
from kernel_index.jax.mask import MaskContract
from kernel_index.jax.target import by_platform


def select(q: Any, k: Any, config: Any, mask: MaskContract, backend: str, interpret: bool | None) -> jax.Array:
    """The selected blocks of each query, int32 [B, T, K, n], ascending, then −1; without gradient."""
    batch, queries = q.shape[:2]
    keys, kv_heads = k.shape[1:3]
    block, hierarchy = config.block_size, config.hierarchy
    topk = min(config.topk, routing.num_blocks(keys, block))
    legal = routing.legal_blocks(mask, batch, queries, keys, block)
    means = routing.block_means(k, block, mask)  # [B, blocks, K, D]
    mean_queries = routing.group_queries(q, kv_heads)  # [B, T, K, D]
    operands = (mean_queries, means, legal, pallas.tile_ends(mask, queries, keys))
    if backend == "pallas" and config.fused_scoring and hierarchy is None:
        return by_platform(interpret, functools.partial(pallas.select_fused, topk, block), *operands)
    if backend == "pallas":
        scores = by_platform(interpret, functools.partial(pallas.score_blocks, block), *operands)
    else:
        scores = jnp.einsum("btkd,bnkd->btkn", mean_queries, means, precision=lax.Precision.HIGHEST)
    if hierarchy is None:
        return routing.top_blocks(scores, legal, topk)
    return routing.expanded_blocks(scores, legal, topk, *hierarchy)


select_compiled = jax.jit(select, static_argnames=("config", "backend", "interpret"))
