"""The decorator of every Triton function here: its kernels say at each launch whether products and sums are fused.

Triton's own default differs between versions and can be changed by an environment variable, and with it results would.
"""

import functools
from collections.abc import Callable
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from kernel_index.core.triton.launch import interpreting

ENABLE_FP_FUSION = True
"""A product and its sum are one instruction with one rounding (FMA): so it was in every figure that is recorded."""


class Kernel(JITFunction):
    """Triton's function with ``enable_fp_fusion`` in every launch."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.run, grid=grid, warmup=False, enable_fp_fusion=ENABLE_FP_FUSION)


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for kernels and for the device functions that they call."""
    return triton.jit(function) if interpreting() else Kernel(function)
