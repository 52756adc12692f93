"""Loads and calls C++ kernels for the CPU: the ``native`` backends.

A source stands beside its op's ``native.py``; the headers of this folder hold what several sources need.
``kernel-index build`` compiles them ahead of time (``build.py``).  ``auto`` waits for no compiler: it passes over a
kernel that is not built yet, and the receipt says so; a call with ``backend="native"`` builds what it needs.
Matrix products are oneDNN's, through the function that PyTorch's own attention calls, so they use the machine's matrix
units; a kernel's own code is everything between two products.  Without AVX-512 the products are ours, too.  See
docs/decisions/0013-native-kernels.md, 0017-compiled-ahead.md and 0036-native-kernels-on-avx2.md.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.inductor import MIN_ELEMENTS
from kernel_index.core.native import build
from kernel_index.core.rules import (
    INSIDE_FUNCTORCH,
    NEEDS_CPU,
    NEEDS_PLAIN,
    NEGATED,
    NO_BACKWARD,
    ONLY_FLOAT32,
    PLAIN,
    inside_functorch,
    opaque_why_not,
)
from kernel_index.core.target import (
    NO_VECTORS,
    has_bfloat16_products,
    has_cxx_compiler,
    has_vectors,
    vector_instructions,
)

DTYPES = (torch.float32, torch.bfloat16)
SMALL_WORK = 1 << 20
"""Multiplications, or elements times 16, that a thread does in about the time that starting a second one takes."""

Rule = Callable[..., str | None]

NOT_BUILT = "not built yet on this machine: `kernel-index build` builds it, and so does a call with backend='native'"

ROWS = Path(__file__).with_name("rows.cpp")
"""Kernels of three small ops for few rows, in one source."""


class CannotRun(RuntimeError):
    """This machine runs no native kernel; dispatch never comes so far."""


NO_BFLOAT16 = "needs a CPU with AVX512_BF16 for bfloat16"


def why_not(*tensors: Tensor) -> str | None:
    """The rules that all native kernels share, in addition to those of the op's ``cpu`` backend."""
    if (rule := machine_why_not()) is not None:
        return rule
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return NEEDS_PLAIN
        if not torch.compiler.is_compiling() and tensor.is_neg():
            return NEGATED
    if torch.autograd.forward_ad._current_level >= 0:
        return "inside forward-mode differentiation: it would lose the tangents"
    if tensors[0].dtype not in DTYPES:
        return "needs float32 or bfloat16"
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors) and not has_bfloat16_products():
        return NO_BFLOAT16
    return None


def machine_why_not() -> str | None:
    """Why no native kernel runs on this machine, or None."""
    if not _has_vectors():
        return NO_VECTORS
    return None if has_libraries() else "needs a C++ compiler (g++ or clang++)"


def op_why_not(*tensors: Tensor | None) -> str | None:
    """The rules of native kernels that are registered ops with a gradient: a trace and a mode see them."""
    present = [t for t in tensors if t is not None]
    if inside_functorch():
        return INSIDE_FUNCTORCH
    for tensor in present:
        if tensor.device.type != "cpu":
            return NEEDS_CPU
        if tensor.dtype not in DTYPES:
            return "needs float32 or bfloat16"
    return why_not(*present)


def rows_why_not(rows: Sequence[Tensor], *others: Tensor) -> str | None:
    """The rules of the kernels in ``rows.cpp``: they read and write ``rows``; the other tensors become float32."""
    if (rule := opaque_why_not(*rows, *others)) is not None:
        return rule
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*rows, *others)):
        return NO_BACKWARD
    for tensor in rows:
        if tensor.dtype not in DTYPES:
            return "needs float32 or bfloat16"
    for tensor in others:
        if tensor.dtype == torch.float64:
            return ONLY_FLOAT32
    return why_not(*rows, *others)


def rows_not_worth(x: Tensor, *_: Any) -> str | None:
    """``auto`` uses these kernels only without grad, and for few rows."""
    if torch.is_grad_enabled():
        return "gradients are on: it is for few rows under no_grad() or inference_mode()"
    return None if x.numel() < MIN_ELEMENTS else "large enough for a compiled region to pay"


def rows_threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= MIN_ELEMENTS else 1


def threads_for(operations: int) -> int:
    """One thread where starting others would take longer than the work; kernels have the same bits for any number."""
    return torch.get_num_threads() if operations >= SMALL_WORK else 1


def _has_vectors() -> bool:
    return has_vectors() and (vector_instructions() == "AVX2" or torch._C._get_mkldnn_enabled())


def has_libraries() -> bool:
    """Whether the kernels are built, or can be."""
    return has_cxx_compiler() or all(map(is_built, build.sources()))


for _constant in (_has_vectors, has_libraries):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch.py


def once_built(*sources: Path, not_worth: Rule | None = None) -> Rule:
    """The rule by which ``auto`` passes over a kernel that is not built, after the op's own rule of that kind.

    It is the one rule that asks the machine and not the call.
    """

    def are_built() -> bool:
        return all(map(is_built, sources))

    def rule(*call: Any) -> str | None:
        if not_worth is not None and (found := not_worth(*call)) is not None:
            return found
        return None if are_built() else NOT_BUILT

    are_built._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return rule


@functools.cache
def is_built(source: Path) -> bool:
    """Whether a source had a library when this process first asked.

    The answer stays until this process builds a source itself: a run does not change its backends because another
    process built some.
    """
    return build.find(source) is not None


def build_all() -> list[build.Built]:
    """Compile every kernel that is not built yet, a process for each core: what ``kernel-index build`` does.

    Does nothing where no native kernel can run.

    >>> from kernel_index.core import native
    >>> all(built.library.exists() for built in native.build_all())
    True
    """
    if machine_why_not() is not None:
        return []
    done = build.build_all()
    if any(built.seconds for built in done):
        is_built.cache_clear()
    return done


def build_all_or_warn() -> None:
    """The same for who can do without: one line says why kernels are missing, and ``auto`` passes over them."""
    try:
        build_all()
    except build.CannotBuild as error:
        build.logger.warning("no native kernels: %s", str(error).partition("\n")[0])


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """A source's library, which is built if it is not there."""
    built = build.build(source)
    if built.seconds:
        is_built.cache_clear()
    return ctypes.CDLL(str(built.library))


def call(source: Path, function: str, sizes: tuple[int, ...], numbers: tuple[float, ...], *tensors: Tensor) -> None:
    """Call one function of a source with an array of sizes, the numbers, and a pointer to each dense tensor's data."""
    assert all(t.is_cpu for t in tensors), "what a kernel writes to must be on the CPU, whatever the default device"
    run = _function(source, function, len(numbers), len(tensors))
    run(struct.pack(f"{len(sizes)}q", *sizes), *numbers, *[t.data_ptr() for t in tensors])


@functools.cache
def _function(source: Path, name: str, numbers: int, tensors: int) -> Any:
    """Its argument types are set, so that a call need not wrap each argument: decoding a token makes 20 calls."""
    if (rule := machine_why_not()) is not None:  # a CPU without these instructions would end the process
        raise CannotRun(f"{source.name}: {rule}")
    found = library(source)[name]  # an object of its own, where an attribute would be shared
    found.argtypes = [ctypes.c_char_p, *[ctypes.c_float] * numbers, *[ctypes.c_void_p] * tensors]
    found.restype = None
    return found


def floats(x: Tensor) -> Tensor:
    """The tensor as dense float32, without a copy where it is that already."""
    return (x if x.dtype == torch.float32 else x.to(torch.float32)).contiguous()


def suffix(dtype: torch.dtype) -> str:
    """The suffix of the functions for a dtype."""
    return str(dtype).removeprefix("torch.")
