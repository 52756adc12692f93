"""While ``torch.compile`` traces an op, Inductor's worker processes compile the Triton kernels that it will launch.

Triton compiles a kernel at its first launch, one after another in the caller's process: 64 kernels and about a minute
for the first step of the preset ``small``.  A trace knows an op's arguments long before.  So the op's launcher runs
once on tensors of the meta device, as in ``prove aot``; each of its launches ends where Triton would compile, and that
work goes to the processes in which Inductor compiles its own kernels.  The first launch of a kernel waits for them and
finds it in Triton's cache.  Code that is not compiled never comes here.
"""

import concurrent.futures
import functools
import logging
import os
import threading
from collections.abc import Callable
from pickle import PickleError
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kernel_index.core.target import pretend, target_of

logger = logging.getLogger("kernel_index")

PATIENCE = 120.0
"""Seconds after which a launch no longer waits for another process and compiles its kernel itself."""

EXPECTED = (RuntimeError, TypeError, ValueError, AssertionError, ImportError, AttributeError, LookupError, PickleError)
"""What a launcher raises that cannot run without values, and what cannot be sent to another process."""


class _Learning(threading.local):
    """Whether launches of this thread are only learned from."""

    now = False


_LEARNING = _Learning()
_PENDING: dict[Any, list[concurrent.futures.Future[None]]] = {}
"""Each kernel, and what other processes compile of it."""


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
    if place is None or target_of(place).kind != "cuda" or _workers() is None:
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
def _workers() -> Any:
    """The processes of Inductor; None where it has none, as with ``TORCHINDUCTOR_COMPILE_THREADS=1``."""
    try:
        from torch._inductor.async_compile import AsyncCompile, get_compile_threads
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

        if get_compile_threads() <= 1:
            return None
        # Inductor does the same before its first kernel: all of this process are in one folder from now on.
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(torch.cuda.current_device()))
        return AsyncCompile.process_pool()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        logger.debug("no processes that compile kernels ahead: %s", error)
        return None


def submit(kernel: Any, job: Callable[..., None], *args: Any) -> None:
    """Have another process run ``job``, which compiles a variant of a kernel into Triton's cache."""
    future = _workers().submit(functools.partial(_in_folder, os.environ["TRITON_CACHE_DIR"], job), *args)
    _PENDING.setdefault(kernel, []).append(future)


def _in_folder(folder: str, job: Callable[..., None], *args: Any) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
    job(*args)


def wait_for(kernel: Any) -> None:
    """Until no other process compiles a variant of this kernel; one that failed fails again where it is launched."""
    concurrent.futures.wait(_PENDING.pop(kernel, ()), timeout=PATIENCE)
