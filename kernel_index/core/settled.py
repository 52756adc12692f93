"""Whether a call can go like an earlier one of the same sizes, without its checks and without choosing a backend.

For calls of which the host is the limit.  Whoever uses it keeps what an earlier call came to, by a key of all that the
checks and the rules read.
"""

from collections.abc import Hashable
from typing import Any

import torch

from kernel_index.core import dispatch, force, ops, rules
from kernel_index.core.numerics import is_invariant


def goes_by_arguments(op: str) -> bool:
    """Whether nothing but its arguments decides a call on a GPU, and nothing watches it.

    Not while a trace, a mode, a transform or a profiler looks on, nor under autocast, receipts, ``explain``, a forced
    backend, strict mode or invariant numerics.
    """
    return not torch.is_autocast_enabled("cuda") and is_unwatched(op) and not is_invariant()


def is_unwatched(op: str) -> bool:
    """The same, but under autocast and in any numerics, of which the caller asks."""
    if ops.are_seen() or torch.autograd._profiler_enabled():
        return False
    return not (dispatch.is_watched() or any(force.STRICT) or force.forced_for(op))


FIRST_GPU = 0
"""Of the numbers of devices; the CPU has −1."""


def sizes_of(tensors: tuple[Any, ...]) -> Hashable | None:
    """Shapes, strides, dtypes and devices; None unless all are plain tensors of a GPU without gradients, or None."""
    found: list[Any] = []
    recorded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) not in rules.PLAIN or tensor.layout != torch.strided or tensor.is_neg():
            return None
        device, leaf = tensor.get_device(), tensor.requires_grad
        if device < FIRST_GPU or (leaf and recorded):
            return None
        found += (tensor.shape, tensor.stride(), tensor.dtype, device, leaf)
    return tuple(found)


_PLAIN = (bool, int, float, str, type(None))


def numbers_of(values: tuple[Any, ...]) -> Hashable | None:
    """Plain values with their types, since 1, 1.0 and True are equal; None if one is anything else."""
    types = tuple(map(type, values))
    return (values, types) if all(t in _PLAIN for t in types) else None
