"""Attention over a block walk as one differentiable function, for interval attention and clustered attention."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernel_index.jax.attention_backward import gradient_kv, gradient_q
from kernel_index.jax.attention_forward import forward
from kernel_index.jax.block_walk import Walk, inverted
from kernel_index.jax.excluded_rows import finite_rows, not_finite, seen_operands
from kernel_index.jax.kernel_launch import TileMasks
from kernel_index.jax.target import by_platform
from kernel_index.jax.tile_scores import MASKED, Setup

INTERPRETED_WIDTH = 2
"""Blocks of a chunk at most where a kernel is interpreted: the copies of a chunk are unrolled, which is slow there."""


def _run(kernel: Callable[..., Any], setup: Setup, walk: Walk, *arrays: Any) -> Any:
    """``kernel(setup, walk, *arrays)``, compiled or interpreted."""

    def run(interpret: bool, walk: Walk, *arrays: Any) -> Any:
        walk = walk.narrowed(INTERPRETED_WIDTH) if interpret else walk
        return kernel(dataclasses.replace(setup, interpret=interpret), walk, *arrays)

    return by_platform(setup.interpret, run, walk, *arrays)


class Plan(NamedTuple):
    """The int32 arrays of a call: which blocks each tile visits, and what its queries attend to there."""

    walk: Walk
    masks: TileMasks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(setup: Setup, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp in tiles, as ``attention_forward.forward``; differentiable once in q, k and v."""
    return _run(forward, setup, plan.walk, plan.masks, *seen_operands(q, k, v))


def _forward(setup: Setup, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    out, lse = attend(setup, plan, q, k, v)
    return (out, lse), (plan, q, k, v, out, lse)


def _backward(setup: Setup, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    plan, q, k, v, out, lse = saved
    do, d_lse = gradients
    do = do.astype(q.dtype)
    stats = backward_stats(out, jnp.where(_rows(not_finite(q, do)), jnp.nan, lse), do, d_lse)
    operands = (*map(finite_rows, (q, k, v, do)), stats)
    dq = _run(gradient_q, setup, plan.walk, plan.masks, *operands)
    by_keys = inverted(plan.walk, k.shape[2] // setup.block)
    dk, dv = _run(gradient_kv, setup, by_keys, plan.masks, *operands)
    return None, dq, dk, dv


attend.defvjp(_forward, _backward)


def _rows(columns: jax.Array) -> jax.Array:
    """[B, K, tiles, C, 1] as [B, K, tiles, 1, C]."""
    return jnp.swapaxes(columns, 3, 4)


def backward_stats(out: jax.Array, lse: jax.Array, do: jax.Array, d_lse: jax.Array) -> jax.Array:
    """The log-sum-exp and δ of each query, for the backward kernels; float32 [B, K, tiles, 2, C].

    NaN is in the log-sum-exp alone: it reaches the probabilities, which the kernels mask, and nothing that they do not.
    """
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), -1)[..., None, :] - d_lse  # [B, K, tiles, 1, C]
    empty, finite = jnp.isneginf(lse), jnp.isfinite(delta)
    # A query without keys: any score minus a large number makes a probability of 0.
    lse = jnp.where(empty, -MASKED, jnp.where(finite, lse, jnp.nan))
    return jnp.concatenate([lse, jnp.where(empty | ~finite, 0.0, delta)], 3)
