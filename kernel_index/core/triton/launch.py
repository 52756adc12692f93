"""The launch geometry that every Triton kernel shares; needs no Triton, so that rules and launchers can import it.

With ``TRITON_INTERPRET=1`` in the environment before the first launch, kernels run on CPU tensors through Triton's
interpreter: slowly, and for proof, so ``auto`` never picks them there.
"""

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core.numerics import is_invariant
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
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


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
    """Contiguous versions, None kept; no copy of what is contiguous already.

    Under ``numerics("invariant")`` they begin at a multiple of ALIGNED bytes: what Triton compiles for other addresses
    may sum a row in another order.
    """
    aligned = is_invariant()
    return tuple(None if t is None else _aligned(t.contiguous()) if aligned else t.contiguous() for t in tensors)


ALIGNED = 16


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGNED == 0 else x.clone()


def dense_heads(x: Tensor) -> Tensor:
    """For kernels that take any stride but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()


LOG2E = math.log2(math.e)

SMALLEST_DOT = 16
"""Rows and columns that a product on tensor cores has at least."""


class Config(NamedTuple):
    """Rows of a program's tile, rows of the tiles it loops over, warps, stages of the software pipeline.

    ``registers``: of a thread at most, so that enough programs run at once; None for as many as the compiler wants.
    """

    tile: int
    step: int
    num_warps: int
    num_stages: int
    registers: int | None = None


THREE_PROGRAMS = 168
"""``Config.registers`` with which three programs of four warps share the 65536 of an NVIDIA multiprocessor."""

INTERPRETED_CONFIG = Config(SMALLEST_DOT, SMALLEST_DOT, 4, 1)


class AttentionLaunch(NamedTuple):
    """The arguments that an attention kernel takes from the geometry and the score function of a call."""

    config: Config
    constants: dict[str, Any]
    scale: float
    inner: float
    outer: float


def attention_launch(
    config: Config, q: Tensor, v: Tensor, scale: float | None, softcap: float, **constants: Any
) -> AttentionLaunch:
    """The launch of one kernel over q [..., D] and v [..., Dv]; ``constants`` are the kernel's own."""
    width, value_width = q.shape[-1], v.shape[-1]
    scale = width**-0.5 if scale is None else scale
    blocks = {"D": width, "DV": value_width, "BLOCK_D": dot_block(width), "BLOCK_DV": dot_block(value_width)}
    flags = {"CAPPED": softcap > 0, "UPCAST": interpreting()}
    geometry = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.registers is not None:  # NVIDIA's compiler alone has this option
        geometry["maxnreg"] = config.registers
    inner, outer = score_factors(scale, softcap)
    return AttentionLaunch(config, blocks | flags | constants | geometry, scale, inner, outer)


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """``inner`` and ``outer``: logits of base 2 are outer · z, where z is q·k, or tanh(inner · q·k) with a softcap."""
    return (scale / softcap, softcap * LOG2E) if softcap > 0 else (0.0, scale * LOG2E)


def dot_block(size: int) -> int:
    """The power of 2 that holds ``size`` rows or columns of a product."""
    return max(SMALLEST_DOT, next_power_of_2(size))


def strides(*tensors: Tensor) -> list[int]:
    """Of batch, token and head."""
    return [s for x in tensors for s in x.stride()[:3]]


def row_stride(bound: Tensor) -> int:
    """From one batch row of window bounds to the next: 0 where all rows are alike."""
    return 0 if bound.shape[0] == 1 else bound.shape[1]
