"""Activation checkpointing whose backward pass recomputes with the backends that the forward pass ran."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from kernel_index.core.force import forced_here, resumed


def recomputed(function: Callable[..., Any], *args: Any, preserve_rng_state: bool = False) -> Any:
    """``function(*args)``; only the arguments are kept, and backward calls the function again.

    ``ki.force`` blocks around this call also hold for the second one, wherever ``backward()`` is called: a backend of
    another name may save other tensors, which a checkpoint refuses.

    Args:
        function: takes and returns tensors; it must do the same in both calls.
        preserve_rng_state: draw the same random numbers in the second call.
    """
    options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if torch.compiler.is_compiling():  # a trace holds both calls
        return checkpoint(function, *args, **options)
    forced = forced_here()

    def with_the_same_backends(*inputs: Any) -> Any:
        with resumed(forced):
            return function(*inputs)

    return checkpoint(with_the_same_backends, *args, **options)
