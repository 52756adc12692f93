"""What a mask excludes has no influence, also where it is not finite: 0 · NaN is NaN, so a weight of 0 hides nothing.

A row (a token of one head) that is not finite gets one of two forms before it is used:

- NaN throughout, where only scores are made of it.  The mask replaces the scores of those who may not see it; for all
  others score, probability and output are NaN, so that what is not finite is never hidden from whom it concerns.
- 0 throughout, where a product sums over it with weights, which are exactly 0 for those who may not see it.

Forward: ``out(q as NaN, k as NaN where k or v is not finite, v as 0)``.  Backward: all operands as 0, and NaN joins the
scores of the queries that saw something not finite or whose gradient is not finite.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def not_finite(*rows: jax.Array) -> jax.Array:
    """Which rows [..., D] hold something that is not finite in one of the arrays, bool [..., 1]."""
    return functools.reduce(jnp.logical_or, (~jnp.all(jnp.isfinite(x), -1, keepdims=True) for x in rows))


def seen_operands(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v for a forward pass."""
    k = jnp.where(not_finite(k, v), jnp.nan, k)
    return jnp.where(not_finite(q), jnp.nan, q), k, finite_rows(v)


def finite_rows(x: jax.Array) -> jax.Array:
    """x with 0 in each row that is not finite."""
    return jnp.where(not_finite(x), 0, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def excluding(core: Callable[..., tuple], plan: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    """``core(plan, q, k, v, flag)`` in which rows that are not finite reach only those who see them.

    ``core`` is differentiable and returns ``out`` [B, T, H, Dv] and ``lse`` [B, H, T]; it adds ``flag`` [B, T, H, 1] to
    the scores of each query before it masks them.  ``plan`` are arrays without a gradient.
    """
    return core(plan, *seen_operands(q, k, v), jnp.zeros((*q.shape[:3], 1), jnp.float32))


def _forward(core: Callable[..., tuple], plan: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    out, lse = excluding(core, plan, q, k, v)
    return (out, lse), (plan, q, k, v, lse)


def _backward(core: Callable[..., tuple], saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    plan, q, k, v, lse = saved
    d_out, d_lse = gradients
    saw = jnp.isnan(lse) | ~jnp.isfinite(d_lse)  # [B, H, T]
    flag = jnp.where(saw.swapaxes(1, 2)[..., None] | not_finite(q, d_out), jnp.nan, 0.0)
    operands = (finite_rows(x) for x in (q, k, v))
    _, pull = jax.vjp(lambda q, k, v: core(plan, q, k, v, flag), *operands)
    return None, *pull((finite_rows(d_out), jnp.where(jnp.isfinite(d_lse), d_lse, 0)))


excluding.defvjp(_forward, _backward)
