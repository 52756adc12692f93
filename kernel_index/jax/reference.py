"""The specification in plain JAX: softmax over the allowed keys, in at least float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.jax.mask import Intervals

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores: 256 MiB of float32."""


def attention_with_lse_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: Intervals,
    members: jax.Array | None,
    *,
    scale: float | None,
    softcap: float,
    block: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """``out`` [B, T, H, Dv] and ``lse`` [B, H, T].

    ``members``: the blocks of ``block`` keys that each query picked, int32 [B, T, K, n], −1 for none; None for all.
    """
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    factor = width**-0.5 if scale is None else scale
    q_BTKGD = (q.astype(dtype) * factor).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    k_BSKD, v_BSKD = k.astype(dtype), v.astype(dtype)
    key = jnp.arange(keys, dtype=jnp.int32)

    def chunk(q_BTKGD: jax.Array, bounds: Intervals, members: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        allowed = (key >= bounds.start[..., None]) & (key < bounds.end[..., None])  # [B', T, S]
        allowed = allowed[:, None, None]
        if members is not None:
            picked = _is_member(members, block, keys)  # [B, T, K, S]
            allowed = allowed & picked.transpose(0, 2, 1, 3)[:, :, None]
        return _softmax(q_BTKGD, k_BSKD, v_BSKD, allowed, softcap)

    scores = batch * heads * queries * keys
    if scores <= SCORES_AT_ONCE:
        out, lse = chunk(q_BTKGD, bounds, members)
    else:
        out, lse = _in_chunks(chunk, q_BTKGD, bounds, members, max(1, SCORES_AT_ONCE // (batch * heads * keys)))
    out = out.reshape(batch, queries, heads, v.shape[-1]).astype(q.dtype)
    return out, lse.reshape(batch, heads, queries)


def _is_member(members: jax.Array, block: int, keys: int) -> jax.Array:
    blocks = -(-keys // block)
    at = jnp.arange(blocks, dtype=jnp.int32)
    picked = jnp.any(members[..., None] == at, -2)
    return jnp.repeat(picked, block, axis=-1)[..., :keys]


def _softmax(
    q_BTKGD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, allowed: jax.Array, softcap: float
) -> tuple[jax.Array, jax.Array]:
    high = lax.Precision.HIGHEST
    z = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD, precision=high)
    z = softcap * jnp.tanh(z / softcap) if softcap else z
    empty = ~jnp.any(allowed, -1, keepdims=True)
    z = jnp.where(empty, 0.0, jnp.where(allowed, z, -jnp.inf))  # a row of −inf would be NaN, and so its gradient
    p = jnp.where(allowed, jax.nn.softmax(z, -1), 0.0)
    lse = jnp.where(empty[..., 0], -jnp.inf, jax.nn.logsumexp(z, -1))
    return jnp.einsum("bkgts,bskd->btkgd", p, v_BSKD, precision=high), lse


def _in_chunks(chunk: Any, q: jax.Array, bounds: Intervals, members: jax.Array | None, step: int) -> tuple:
    """The same over pieces of the queries, one after the other, recomputed in backward."""
    queries = q.shape[1]
    pieces = -(-queries // step)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * step - queries), *((0, 0) for _ in x.shape[2:])])
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, step, *x.shape[2:]), 1, 0)

    parts = jax.tree.map(cut, (q, bounds, members))
    out, lse = lax.map(jax.checkpoint(lambda part: chunk(*part)), parts)
    out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], pieces * step, *out.shape[3:])[:, :queries]
    lse = jnp.moveaxis(lse, 0, 3)
    return out, lse.reshape(*lse.shape[:3], pieces * step)[..., :queries]
