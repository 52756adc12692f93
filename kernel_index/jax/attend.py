"""Attention over walks as one differentiable function: what interval attention and clustered attention share."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.jax.backward import gradient_kv, gradient_q
from kernel_index.jax.forward import forward
from kernel_index.jax.tiles import NOTHING, Setup, Tiles
from kernel_index.jax.walk import Walk, listed, ranges


class Plan(NamedTuple):
    """Everything about a call that is no query, key or value; int32 arrays."""

    walk: Walk
    tiles: Tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(setup: Setup, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp in tiles; see ``forward.forward``.  Differentiable in q, k and v, once."""
    return forward(setup, plan.walk, plan.tiles, q, k, v)


def _forward(setup: Setup, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    out, lse = forward(setup, plan.walk, plan.tiles, q, k, v)
    return (out, lse), (plan, q, k, v, out, lse)


def _backward(setup: Setup, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    plan, q, k, v, out, lse = saved
    do, d_lse = gradients
    stats = backward_stats(out, lse, do, d_lse)
    operands = (q, k, v, do.astype(q.dtype), stats)
    dq = gradient_q(setup, plan.walk, plan.tiles, *operands)
    by_keys = transposed(plan.walk, k.shape[2] // setup.block)
    dk, dv = gradient_kv(setup, by_keys, plan.tiles, *operands)
    return None, dq, dk, dv


attend.defvjp(_forward, _backward)


def backward_stats(out: jax.Array, lse: jax.Array, do: jax.Array, d_lse: jax.Array) -> jax.Array:
    """What the backward kernels take for each query, float32 [B, K, tiles, 2, C]: log-sum-exp and δ."""
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), -1)[..., None, :] - d_lse
    empty = jnp.isneginf(lse)
    # A query without keys: any score minus a large number makes a probability of 0.
    return jnp.concatenate([jnp.where(empty, -NOTHING, lse), jnp.where(empty, 0.0, delta)], 3)


def transposed(walk: Walk, blocks: int) -> Walk:
    """For each block of keys the tiles that visit it, ascending, one at a time."""
    count = walk.spans[:, :, 0]
    if walk.lists is None:
        first = walk.spans[:, 0, 1]
        end = lax.cummax(first + count[:, 0], axis=1)  # an empty tile between others must not break the order
        block = jnp.arange(blocks, dtype=jnp.int32)
        search = jax.vmap(lambda bounds: jnp.searchsorted(bounds, block, side="right"))
        begin = search(end).astype(jnp.int32)
        return ranges(begin, jnp.maximum(search(first).astype(jnp.int32) - begin, 0))
    lists = walk.lists[:, :, :, 0]
    place = jnp.where(jnp.arange(lists.shape[-1]) < count[..., None], lists, blocks)
    marks = jnp.zeros((*place.shape[:3], blocks), bool)
    at = jnp.meshgrid(*(jnp.arange(n) for n in place.shape[:3]), indexing="ij")
    marks = marks.at[(*(i[..., None] for i in at), place)].set(True, mode="drop")
    return listed(*ascending(marks.swapaxes(2, 3)), width=1)


def ascending(marks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The places that are marked along the last dimension, ascending, then those that are not; and how many are."""
    order = jnp.argsort(~marks, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(marks, -1, dtype=jnp.int32)
