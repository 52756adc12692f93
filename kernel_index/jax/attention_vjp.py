"""Attention over a block walk as one differentiable function, for interval attention and clustered attention."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernel_index.jax.attention_backward import gradient_kv, gradient_q
from kernel_index.jax.attention_forward import forward
from kernel_index.jax.block_walk import Walk, inverted
from kernel_index.jax.kernel_launch import TileMasks
from kernel_index.jax.tile_scores import MASKED, Setup


class Plan(NamedTuple):
    """The int32 arrays of a call: which blocks each tile visits, and what its queries attend to there."""

    walk: Walk
    masks: TileMasks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(setup: Setup, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp in tiles, as ``attention_forward.forward``; differentiable once in q, k and v."""
    return forward(setup, plan.walk, plan.masks, q, k, v)


def _forward(setup: Setup, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    out, lse = forward(setup, plan.walk, plan.masks, q, k, v)
    return (out, lse), (plan, q, k, v, out, lse)


def _backward(setup: Setup, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    plan, q, k, v, out, lse = saved
    do, d_lse = gradients
    stats = backward_stats(out, lse, do, d_lse)
    operands = (q, k, v, do.astype(q.dtype), stats)
    dq = gradient_q(setup, plan.walk, plan.masks, *operands)
    by_keys = inverted(plan.walk, k.shape[2] // setup.block)
    dk, dv = gradient_kv(setup, by_keys, plan.masks, *operands)
    return None, dq, dk, dv


attend.defvjp(_forward, _backward)


def backward_stats(out: jax.Array, lse: jax.Array, do: jax.Array, d_lse: jax.Array) -> jax.Array:
    """The log-sum-exp and δ of each query, for the backward kernels; float32 [B, K, tiles, 2, C]."""
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), -1)[..., None, :] - d_lse  # [B, K, tiles, 1, C]
    empty = jnp.isneginf(lse)
    # A query without keys: any score minus a large number makes a probability of 0.
    return jnp.concatenate([jnp.where(empty, -MASKED, lse), jnp.where(empty, 0.0, delta)], 3)
