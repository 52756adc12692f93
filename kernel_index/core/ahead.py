"""While ``torch.compile`` traces an op, threads compile the Triton kernels that it will launch.

Triton compiles a kernel at its first launch, one after another: 70 kernels and 45 s of the 70 that the first step of
the preset ``small`` took.  A trace knows an op's arguments long before.  So the op's launcher runs once on tensors of
the meta device, as in ``prove aot``; each of its launches ends where Triton would compile, and threads do that.  Three
quarters of the work are passes of LLVM and ``ptxas``, which do not hold Python's lock.  The first launch of a kernel
waits for what is compiled of it.  Code that is not compiled never comes here.
"""

import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kernel_index.core.target import pretend, target_of

logger = logging.getLogger("kernel_index")

THREADS = 8

EXPECTED = (RuntimeError, TypeError, ValueError, AssertionError, ImportError, AttributeError, LookupError)
"""What a launcher raises that cannot run without values."""


class _Learning(threading.local):
    """Whether launches of this thread are only learned from."""

    now = False


_LEARNING = _Learning()
_PENDING: dict[Any, dict[str, concurrent.futures.Future[Any]]] = {}
"""Each kernel, and the variants of it that are compiled."""


def is_learning() -> bool:
    """Whether a launch stands for a later one: it must compile nothing here, and start nothing."""
    return _LEARNING.now


def learning_from(launch: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake of an op, which also has the kernels of its launcher compiled if ``torch.compile`` traces it."""
    known: set[Any] = set()

    @functools.wraps(fake)
    def traced(*args: Any) -> Any:
        if _LEARNING.now:  # the launcher of one op calls another
            return launch(*args)
        if torch._guards.TracingContext.try_get() is not None:
            _learn(launch, args, known)
        return fake(*args)

    return traced


def _learn(launch: Callable[..., Any], args: tuple[Any, ...], known: set[Any]) -> None:
    place = next((a.device for a in args if isinstance(a, Tensor)), None)
    if place is None or target_of(place).kind != "cuda":
        return
    key = tuple(map(_kind, args))
    if None in key or key in known:
        return
    known.add(key)
    _LEARNING.now = True
    try:
        with _disable_current_modes(), torch.no_grad(), pretend(target_of(place)):
            launch(*map(_stand_in, args))
    except EXPECTED as error:  # the launch itself will say it
        logger.debug("kernels of %s are not compiled ahead: %s", launch.__qualname__, error)
    finally:
        _LEARNING.now = False


def _kind(arg: Any) -> Any:
    """What tells one call from another; None if a size is not a number yet."""
    if isinstance(arg, Tensor):
        sizes = (*arg.shape, *arg.stride())
        return None if any(type(n) is not int for n in sizes) else (arg.dtype, arg.ndim, *sizes)
    if isinstance(arg, (list, tuple)):
        kinds = tuple(map(_kind, arg))
        return None if None in kinds else kinds
    return None if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)) else (type(arg), arg)


def _stand_in(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
    return [_stand_in(a) for a in arg] if isinstance(arg, (list, tuple)) else arg


@functools.cache
def _threads() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(THREADS, "kernel_index compiles")


def submit(kernel: Any, variant: str, compiled: Callable[[], Any]) -> None:
    """Have a thread compile a variant of a kernel."""
    pending = _PENDING.setdefault(kernel, {})
    if variant not in pending:
        pending[variant] = _threads().submit(compiled)


def wait_for(kernel: Any) -> None:
    """Until no thread compiles a variant of this kernel; one that failed fails again where it is launched."""
    concurrent.futures.wait(_PENDING.pop(kernel, {}).values())
