"""Where JAX would run a call, and whether a Pallas kernel is compiled or interpreted there."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

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


def is_interpreted(array: Any) -> bool | None:
    """Whether a Pallas kernel is interpreted for this array, as a CPU does.

    None while the array is traced: the place of tracing is not the place of running, so ``by_platform`` decides.
    """
    return None if is_traced(array) and not _PRETENDED else platform_of(array) == "cpu"


_MODES = {False: "compiled", True: "interpreted", None: "compiled for a TPU, interpreted elsewhere"}


def mode_of(array: Any) -> str:
    """How a Pallas kernel runs for this array, for the receipt, which is written while a program is traced."""
    return _MODES[is_interpreted(array)]


def by_platform(interpret: bool | None, function: Callable[..., Any], *operands: Any) -> Any:
    """``function(interpret, *operands)``; for None, the platform that the program is lowered for decides."""
    if interpret is not None:
        return function(interpret, *operands)
    compiled, interpreted = functools.partial(function, False), functools.partial(function, True)
    return lax.platform_dependent(*operands, tpu=compiled, default=interpreted)


def on_accelerator(call: tuple) -> bool:
    """Whether the first array of a call is on an accelerator; ``strict`` asks this."""
    arrays = (leaf for leaf in jax.tree.leaves(call) if isinstance(leaf, jax.Array))
    first = next(arrays, None)
    return first is not None and platform_of(first) != "cpu"


ACCELERATORS.append(on_accelerator)
