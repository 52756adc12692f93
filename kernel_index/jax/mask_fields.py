"""The checks of the fields of a mask contract for JAX, in the words of torch's; and dataclasses as pytrees."""

from typing import Any

import jax
import numpy as np
import torch

from kernel_index.core import checks as host
from kernel_index.jax import checks
from kernel_index.masks.prefix_tree import contract


def check_rows(name: str, value: Any) -> None:
    """Integers [B, S], or [S] for every row alike."""
    if value is None:
        return
    checks.is_integer_array(name, value)
    if value.ndim not in (1, 2):
        raise ValueError(f"{name} must be [B, S], or [S] for every row alike, got shape {tuple(value.shape)}")


def check_lengths(name: str, value: Any) -> None:
    """Cumulative lengths: integers [n + 1]."""
    checks.is_integer_array(name, value)
    if value.ndim != 1 or value.shape[0] == 0:
        raise ValueError(f"{name} must be cumulative lengths, [n + 1], got shape {tuple(value.shape)}")


def check_count(name: str, value: Any, minimum: int | None = None) -> None:
    """A number for all rows, or integers [B]."""
    if value is None:
        return
    if not isinstance(value, jax.Array):
        host.is_int(name, value, minimum=minimum)
        return
    checks.is_integer_array(name, value)
    if value.ndim > 1:
        raise ValueError(f"{name} must be one number for each row, shape [B], got shape {tuple(value.shape)}")


def check_nested(subtree_end: jax.Array) -> None:
    """Raise unless the subtrees are nested, where values may be read."""
    if checks.is_readable(subtree_end):
        contract.check_nested(torch.from_numpy(np.array(subtree_end)))


def register(cls: type, leaves: tuple[str, ...], static: tuple[str, ...]) -> None:
    """Make a dataclass a pytree whose fields are not checked again: JAX also fills trees with markers."""

    def flatten(x: Any) -> tuple:
        return tuple(getattr(x, n) for n in leaves), tuple(getattr(x, n) for n in static)

    def unflatten(aux: tuple, children: Any) -> Any:
        x = object.__new__(cls)
        for name, value in zip((*leaves, *static), (*children, *aux), strict=True):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
