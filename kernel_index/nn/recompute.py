"""Activation checkpointing whose recomputation chooses its backends as the forward pass did."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from kernel_index.core.force import forced_here, resumed


def recomputed(function: Callable[..., Any], *args: Any, preserve_rng_state: bool = True) -> Any:
    """``function(*args)``, of which only the arguments are kept; backward computes the rest again.

    A ``ki.force`` block around the forward pass also holds for the recomputation, wherever ``backward()`` is called.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> recomputed(torch.square, x).sum().backward()
    >>> x.grad
    tensor([2., 2.])
    """
    options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if torch.compiler.is_compiling():  # the choices are made while it traces, for the recomputation too
        return checkpoint(function, *args, **options)
    forced = forced_here()

    def under_the_same_force(*inputs: Any) -> Any:
        with resumed(forced):
            return function(*inputs)

    return checkpoint(under_the_same_force, *args, **options)
