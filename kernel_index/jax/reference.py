"""The specification in plain JAX: softmax over the allowed keys, in at least float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.jax.excluded_rows import excluding
from kernel_index.jax.mask_bounds import RowBounds, allowed

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores: 256 MiB of float32."""


def attention_with_lse_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: RowBounds,
    selected: jax.Array | None,
    *,
    scale: float | None,
    softcap: float,
    block: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """``out`` [B, T, H, Dv] and ``lse`` [B, H, T].

    ``selected``: the selected blocks of ``block`` keys of each query, int32 [B, T, K, n], −1 for none; None for all.
    """
    core = functools.partial(_attend, scale=scale, softcap=softcap, block=block)
    return excluding(core, (bounds, selected), q, k, v)


def _attend(
    plan: tuple[RowBounds, jax.Array | None],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    flag: jax.Array,
    *,
    scale: float | None,
    softcap: float,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """``flag`` [B, T, H, 1] joins the scores of a query."""
    bounds, selected = plan
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    factor = width**-0.5 if scale is None else scale
    grouped = (batch, queries, kv_heads, heads // kv_heads)
    q_BTKGD = (q.astype(dtype) * factor).reshape(*grouped, width)
    flag_BTKG1 = flag.reshape(*grouped, 1)
    k_BSKD, v_BSKD = k.astype(dtype), v.astype(dtype)
    key = jnp.arange(keys, dtype=jnp.int32)

    def chunk(
        q_BTKGD: jax.Array,
        flag_BTKG1: jax.Array,
        start: jax.Array,
        end: jax.Array,
        query: jax.Array,
        selected: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        seen = allowed(RowBounds(start, end, bounds.q_end), key, query)[:, None, None]  # [B', 1, 1, T, S]
        if selected is not None:
            is_selected = _selects(selected, block, keys)  # [B, T, K, S]
            seen = seen & is_selected.transpose(0, 2, 1, 3)[:, :, None]
        return _softmax(q_BTKGD, k_BSKD, v_BSKD, flag_BTKG1, seen, softcap)

    scores = batch * heads * queries * keys
    query = jnp.arange(queries, dtype=jnp.int32)[None]
    operands = (q_BTKGD, flag_BTKG1, bounds.start, bounds.end, query, selected)
    if scores <= SCORES_AT_ONCE:
        out, lse = chunk(*operands)
    else:
        out, lse = _in_chunks(chunk, operands, max(1, SCORES_AT_ONCE // (batch * heads * keys)))
    out = out.reshape(batch, queries, heads, v.shape[-1]).astype(q.dtype)
    return out, lse.reshape(batch, heads, queries)


def _selects(selected: jax.Array, block: int, keys: int) -> jax.Array:
    """Whether a key is in one of the query's blocks, bool [B, T, K, S]."""
    blocks = jnp.arange(-(-keys // block), dtype=jnp.int32)
    is_selected = jnp.any(selected[..., None] == blocks, -2)  # [B, T, K, blocks]
    return jnp.repeat(is_selected, block, axis=-1)[..., :keys]


def _softmax(
    q_BTKGD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    flag_BTKG1: jax.Array,
    allowed: jax.Array,
    softcap: float,
) -> tuple[jax.Array, jax.Array]:
    high = lax.Precision.HIGHEST
    z = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD, precision=high)  # [B, K, G, T, S]
    z = softcap * jnp.tanh(z / softcap) if softcap else z
    z = z + flag_BTKG1.transpose(0, 2, 3, 1, 4)
    empty = ~jnp.any(allowed, -1, keepdims=True)
    z = jnp.where(empty, 0.0, jnp.where(allowed, z, -jnp.inf))  # a row of −inf would be NaN, and so its gradient
    p = jnp.where(allowed, jax.nn.softmax(z, -1), 0.0)
    lse = jnp.where(empty[..., 0], -jnp.inf, jax.nn.logsumexp(z, -1))
    return jnp.einsum("bkgts,bskd->btkgd", p, v_BSKD, precision=high), lse


def _in_chunks(chunk: Any, operands: tuple, size: int) -> tuple[jax.Array, jax.Array]:
    """``chunk`` over ``size`` queries at a time, one chunk after the other, recomputed in backward."""
    batch, queries = operands[0].shape[:2]
    count = -(-queries // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - queries), *((0, 0) for _ in x.shape[2:])])
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    chunks = jax.tree.map(split, operands)
    out, lse = lax.map(jax.checkpoint(lambda operands: chunk(*operands)), chunks)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, count * size, *out.shape[3:])[:, :queries]
    lse = jnp.moveaxis(lse, 0, 3)
    return out, lse.reshape(*lse.shape[:3], count * size)[..., :queries]
