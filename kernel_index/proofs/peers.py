"""Liger-Kernel's kernels for the same calls, so that ``prove traffic`` can count them beside ours where they run.

They are written for a GPU.  To run in the interpreter they get what a GPU gives them: float arguments as float32 and
libdevice's functions.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

NAME = "Liger-Kernel"


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


@contextlib.contextmanager
def on_the_interpreter() -> Iterator[None]:
    """Triton's interpreter with the float arguments and the libdevice functions that Liger's kernels expect."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter
    from triton.language.extra import libdevice

    convert = interpreter._implicit_cvt

    def as_on_a_gpu(value: Any) -> Any:
        if type(value) is float:
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter, "_implicit_cvt", as_on_a_gpu))
        stack.enter_context(mock.patch.object(libdevice, "rsqrt", lambda x: tl.math.rsqrt(x)))  # as patched then
        yield


def prepare(op: str, call: dict[str, Any]) -> Callable[..., Any] | None:
    """Liger's function for the tensors of our call that need gradients; None where it has none.

    On a CPU it counts one processor, so of the partial sums of a weight's gradient, one row for each processor, all
    but one are missing from its figure.
    """
    from liger_kernel.ops import fused_add_rms_norm, relu_squared, rope, swiglu

    if op == "fused_residual_add_rms_norm":
        norm = fused_add_rms_norm.LigerFusedAddRMSNormFunction
        return lambda residual, delta, weight: norm.apply(delta, residual, weight, 1e-8, 0.0, "llama", False)
    if op == "fused_relu_squared":
        return lambda x: relu_squared.LigerReLUSquaredFunction.apply(x)
    if op == "fused_gated_activation":
        return lambda gate, up: swiglu.LigerSiLUMulFunction.apply(gate, up)
    if op == "fused_rope_qk":
        tables = [torch.cat((call[n], call[n]), -1)[..., 0, :] for n in ("cos", "sin")]
        return lambda q, k: rope.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *tables)  # in place
    return None
