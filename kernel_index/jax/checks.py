"""The argument checks for JAX arrays, in the words of ``kernel_index.core.checks``."""

from typing import Any

import jax
import jax.numpy as jnp

from kernel_index.core import checks as host

__all__ = [
    "has_dtype",
    "has_rank",
    "has_shape",
    "host",
    "is_array",
    "is_floating",
    "is_integer_array",
    "is_readable",
    "is_traced",
]


def is_array(name: str, value: Any) -> None:
    if not isinstance(value, jax.Array):
        raise TypeError(f"{name} must be a jax.Array, got {type(value).__name__}")


def is_floating(name: str, value: Any) -> None:
    is_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {value.dtype}")


def is_integer_array(name: str, value: Any) -> None:
    is_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {value.dtype}")


def has_rank(name: str, value: jax.Array, rank: int, legend: str) -> None:
    if value.ndim != rank:
        raise ValueError(f"{name} must be {legend}, got shape {tuple(value.shape)}")


def has_shape(name: str, value: jax.Array, shape: tuple[int, ...], legend: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {legend} {tuple(shape)}, got shape {tuple(value.shape)}")


def has_dtype(name: str, value: jax.Array, dtype: Any, why: str) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {jnp.dtype(dtype)} {why}, got {value.dtype}")


def is_traced(value: Any) -> bool:
    """Whether the values are unknown: inside jit, vmap, grad."""
    return isinstance(value, jax.core.Tracer)


def is_readable(value: jax.Array) -> bool:
    """Whether the values may be read here: they are known, and no device is waited for."""
    return not is_traced(value) and value.is_fully_addressable and all(d.platform == "cpu" for d in value.devices())
