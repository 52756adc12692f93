"""What every ``triton`` backend shares: its rules, its registered ops, its launch geometry.

A kernel's ``torch_op.py`` registers its launchers with ``register``; the launchers live in its ``triton.py``, which is
imported at the first launch.  With ``TRITON_INTERPRET=1`` in the environment before that, kernels run on CPU tensors
through Triton's interpreter: slowly, and for proof, so ``auto`` never picks them there.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_index.inductor import NEGATED, PLAIN, inside_functorch
from kernel_index.locks import ThreadLock
from kernel_index.target import Target, has_package, target_of

MIN_ARCH = 80

ON_A_CPU = "needs CUDA or ROCm tensors (or TRITON_INTERPRET=1)"


@functools.cache  # Triton, too, decides once, when a kernel is decorated
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreting() -> bool:
    """Whether Triton kernels of this process run through the interpreter."""
    return _interpreting()


interpreting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch.py


def why_not(*tensors: Any) -> str | None:
    """The rules that every Triton backend shares; arguments that are not tensors are ignored."""
    if not has_package("triton"):
        return "needs the triton package (pip install triton)"
    if inside_functorch():
        return "inside a torch.func transform"
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if type(tensor) not in PLAIN:
            return "needs plain tensors, not a tensor subclass"
        if not torch.compiler.is_compiling() and tensor.is_neg():
            return NEGATED
        if tensor.is_cpu and not interpreting():  # most calls on a CPU end here, before anything is looked up
            return ON_A_CPU
        rule = _device_rule(target_of(tensor.device))
        if rule is not None:
            return rule
        if tensor.dtype == torch.float64:
            return "computes in float32: float64 is the reference's"
    return None


def _device_rule(target: Target) -> str | None:
    if target.kind == "cpu":
        return None if interpreting() else ON_A_CPU
    if target.kind not in ("cuda", "hip"):
        return ON_A_CPU
    if interpreting():
        return "TRITON_INTERPRET=1 interprets on the CPU"
    if isinstance(target.arch, int) and target.arch < MIN_ARCH:
        return "needs compute capability 8.0 or newer"
    return None


def not_worth(*tensors: Any) -> str | None:
    """``auto`` leaves the interpreter alone."""
    on_cpu = any(isinstance(t, Tensor) and target_of(t.device).kind == "cpu" for t in tensors)
    return "interpreted on a CPU: only when asked for by name" if on_cpu else None


LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""Qualified name of each registered op -> what it launches on a device."""


def register(
    schema: str, launch: Callable[..., Any], fake: Callable[..., Any], keys: tuple[str, ...] = ("CPU", "CUDA")
) -> torch._ops.OpOverload:
    """Define ``kernel_index::<schema>`` with a launcher and a fake, and return the op to call.

    ``define`` + ``impl`` rather than ``triton_op``: the latter neither traces nor passes ``opcheck`` under the
    interpreter.  Launcher and fake take their outputs from one ``allocate`` function, so that they cannot disagree.
    """
    name = schema.partition("(")[0]
    qualified = f"kernel_index::{name}"
    LAUNCHERS[qualified] = launch
    torch.library.define(qualified, schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    for key in keys:  # ROCm's key is CUDA
        torch.library.impl(qualified, key, launch if key == "CUDA" else _one_at_a_time(launch))
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.kernel_index, name).default


_INTERPRETER = ThreadLock()


def _one_at_a_time(launch: Callable[..., Any]) -> Callable[..., Any]:
    """On a CPU: Triton's interpreter keeps the place of the running program in globals, which threads would share."""

    @functools.wraps(launch)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _INTERPRETER.held() if interpreting() else contextlib.nullcontext():
            return launch(*args, **kwargs)

    return alone


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
