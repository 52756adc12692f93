"""The launch geometry that every Triton kernel shares; needs no Triton, so that rules and launchers can import it.

With ``TRITON_INTERPRET=1`` in the environment before the first launch, kernels run on CPU tensors through Triton's
interpreter: slowly, and for proof, so ``auto`` never picks them there.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.target import target_of


@functools.cache  # Triton, too, decides once, when a kernel is decorated
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreting() -> bool:
    """Whether Triton kernels of this process run through the interpreter."""
    return _interpreting()


interpreting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch.py


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170, "gfx942": 304, "gfx950": 256}
"""Of the data-centre part (sm_120: the largest) of an architecture that a proof compiles for without having it."""


def processors(tensor: Tensor) -> int:
    """How many programs of a persistent kernel the tensor's device runs at once; 4 under the interpreter."""
    if tensor.is_cuda:
        return _processors(tensor.device.index or 0)
    return PROCESSORS.get(target_of(tensor.device).arch, INTERPRETED[0])


INTERPRETED = [4]
"""Processors that the interpreter stands for; the traffic proof puts those of a GPU here."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, int(n) - 1).bit_length()


def dense(tensors: Sequence[Tensor | None]) -> Any:
    """Contiguous versions, None kept; no copy of what is contiguous already."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def dense_heads(x: Tensor) -> Tensor:
    """For kernels that take any stride but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()
