"""Where JAX would run a call, and whether a Pallas kernel is compiled or interpreted there."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import jax

from kernel_index.core.dispatch import ACCELERATORS
from kernel_index.jax.checks import is_traced

_PRETENDED: list[str] = []


@contextlib.contextmanager
def pretend(platform: str) -> Iterator[None]:
    """Inside the block calls count as calls on this platform: how a proof compiles for absent hardware."""
    _PRETENDED.append(platform)
    try:
        yield
    finally:
        _PRETENDED.pop()


def platform_of(array: Any) -> str:
    """``"tpu"``, ``"cpu"`` or ``"gpu"``: of the array's device, or the default one while it is traced."""
    if _PRETENDED:
        return _PRETENDED[-1]
    if is_traced(array) or not isinstance(array, jax.Array):
        return jax.default_backend()
    return next(iter(array.devices())).platform


def mode_of(array: Any) -> Literal["compiled", "interpreted"]:
    """How a Pallas kernel runs for this array: a CPU interprets it."""
    return "interpreted" if platform_of(array) == "cpu" else "compiled"


def on_accelerator(call: tuple) -> bool:
    """Whether the first array of a call is on an accelerator; ``strict`` asks this."""
    arrays = (leaf for leaf in jax.tree.leaves(call) if isinstance(leaf, jax.Array))
    first = next(arrays, None)
    return first is not None and platform_of(first) != "cpu"


ACCELERATORS.append(on_accelerator)
