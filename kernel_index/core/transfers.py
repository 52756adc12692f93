"""Tables of integers that the host makes: copied there, and to a device.

NumPy copies, with one thread: PyTorch wakes all of them from 32,768 elements on, which cost 4 ms a table of 1 MiB on a
host that had other work.
"""

import numpy as np
import torch
from torch import Tensor

from kernel_index.core import rules

STAGED = 1 << 16
"""Bytes up to which CUDA keeps a copy of what it sends, so that the host goes on at once."""


def values_of(x: Tensor) -> np.ndarray:
    """The integers of a table; waits for its device."""
    if rules.inside_functorch():  # whose tensors have no memory of their own
        return np.array(x.tolist(), np.int64).reshape(x.shape)
    return x.detach().cpu().numpy()


def _has_memory(x: Tensor) -> bool:
    """Whether x is a plain tensor of the host, outside of a trace, a transform and a mode."""
    if torch.compiler.is_compiling() or rules.inside_functorch() or rules.inside_dispatch_mode():
        return False
    return type(x) is Tensor and x.device.type == "cpu"


def copied(x: Tensor) -> Tensor:
    """A copy of a table on the host."""
    return torch.from_numpy(x.detach().numpy().copy())


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on ``device``.  To a GPU the host goes on at once: what is long goes through pinned memory."""
    if device.type != "cuda" or not _has_memory(x):
        return x.to(device)
    if x.nbytes > STAGED and not x.is_pinned():
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        pinned.numpy()[...] = x.detach().numpy()
        x = pinned
    return x.to(device, non_blocking=True)
