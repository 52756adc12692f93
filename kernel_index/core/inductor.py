"""Regions of plain PyTorch that Inductor compiles for the CPU: the ``inductor`` backend of every elementwise op.

A kernel writes its forward and its backward as plain functions and wraps each in a ``Region``.  The first region of a
process costs about 15 s to compile (2 s from the disk cache), each further one about 1 s.  So there are few regions,
compiled for each dtype and width, never for each token count.  See docs/decisions/0002-inductor-on-the-cpu.md.
"""

import contextlib
import functools
import inspect
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kernel_index.core import rules
from kernel_index.core.locks import ThreadLock
from kernel_index.core.rules import opaque_why_not, plain_why_not
from kernel_index.core.target import NO_GXX, has_inductor_compiler

logger = logging.getLogger("kernel_index")

MIN_ELEMENTS = 1 << 16
"""Below this many elements ``auto`` uses no compiled region: overhead, not memory, then decides the time of a call."""

TOO_SMALL = "too small for a compiled region to pay"


def why_not(*tensors: Any) -> str | None:
    """The rules that every compiled region shares; arguments that are not tensors are ignored."""
    if (rule := opaque_why_not(*tensors)) is not None:
        return rule
    if not has_inductor_compiler():
        return NO_GXX
    return "torch.compile is switched off" if _compile_is_off() else None


def not_worth(x: Tensor, *_: Any) -> str | None:
    """Why ``auto`` does not use a compiled region for few elements."""
    return TOO_SMALL if x.numel() < MIN_ELEMENTS else None


@functools.cache  # Dynamo, too, reads these once, when it is imported
def _compile_is_disabled() -> bool:
    return os.environ.get("TORCH_COMPILE_DISABLE") == "1" or os.environ.get("TORCHDYNAMO_DISABLE") == "1"


def why_not_or_traced(*tensors: Any) -> str | None:
    """``why_not`` for an op that keeps its own backward formula inside the caller's torch.compile.

    While torch.compile traces, on any device, each region is inlined into the caller's graph: see ``Region.__call__``.
    """
    return plain_why_not(*tensors) if torch.compiler.is_compiling() else why_not(*tensors)


def not_worth_or_traced(x: Tensor, *_: Any) -> str | None:
    """``not_worth`` for the same ops; inside torch.compile every size is worth it."""
    return None if torch.compiler.is_compiling() else not_worth(x)


_COMPILING = ThreadLock()


def _compile_is_off() -> bool:
    if _compile_is_disabled():
        return True
    eval_frame = sys.modules.get(
        "torch._dynamo.eval_frame"
    )  # torch.compile can only be switched off once this is loaded
    return eval_frame is not None and (torch._dynamo.config.disable or eval_frame._stance.stance != "default")


class Region:
    """A plain function of tensors and constants, compiled by Inductor on first use.

    ``dynamic`` maps a tensor parameter to the dimensions whose size may change from call to call; every other size,
    every dtype and every constant selects a compiled variant.  Results therefore depend on the call alone, not on the
    shapes of earlier calls.
    """

    def __init__(self, function: Callable[..., Any], **dynamic: tuple[int, ...]):
        self.function = function
        parameters = inspect.signature(function).parameters.items()
        self.parameters = tuple(name for name, p in parameters if p.kind is not p.KEYWORD_ONLY)  # those keep defaults
        self.dynamic = tuple(dynamic.get(name, ()) for name in self.parameters)
        self.variants: dict[tuple, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(*args)
        args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
        key = (torch.get_num_threads(), *map(_static_part, args, self.dynamic))
        variant = self.variants.get(key)
        if variant is None:
            with _COMPILING.held():  # one thread compiles a variant; others that want it wait and take it
                return self._run(self.variants.get(key) or self._compile(key), args)
        return self._run(variant, args)

    def _run(self, variant: Callable[..., Any], args: tuple) -> Any:
        # A backward pass may run inside a mode (a FLOP counter, a checkpoint) that was not active in its forward pass.
        # Dynamo refuses to compile inside a mode, and a mode could not see into a compiled kernel.
        with torch.no_grad(), _outside_modes():
            return variant(*args)

    def _compile(self, key: tuple) -> Callable[..., Any]:
        # Each variant gets its own code object: Dynamo counts recompilations by code object and refuses the ninth, and
        # it would make a static size dynamic after the second variant.
        function = types.FunctionType(
            self.function.__code__.replace(),
            self.function.__globals__,
            self.function.__name__,
            self.function.__defaults__,
        )
        function.__kwdefaults__ = self.function.__kwdefaults__
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        if compiled is function:  # torch.compile was switched off in a way that why_not() does not check
            raise RuntimeError(f"torch.compile is switched off: it left {self.function.__name__} uncompiled")

        def first_call(*args: Any) -> Any:
            with building(self.function.__name__):
                out = mark_and_run(*args)
            self.variants[key] = mark_and_run  # only now: after a failure or an interrupt the next call compiles again
            return out

        def mark_and_run(*args: Any) -> Any:
            return compiled(*(_marked(a, dims) for a, dims in zip(args, self.dynamic, strict=True)))

        return first_call


def sum_rows(values: Tensor) -> Tensor:
    """``values.sum(0)`` for use inside a region: the reduction of a weight's gradient over tokens.

    The sum of a whole column strides through memory.  Sums of 16 rows, which a second sum adds up, stay in cache (4
    times faster at 4096 × 4096 in float32), round less, and do not depend on the number of threads.
    """
    if values.device.type != "cpu":
        return values.sum(0)
    rows = values.shape[0]
    chunks = rows // 16 + 2  # at least 2, as Inductor specialises 1; the last rows are padding
    padded = torch.nn.functional.pad(values, (0, 0) * (values.ndim - 1) + (0, 16 * chunks - rows))
    return padded.view(chunks, 16, *values.shape[1:]).sum(1).sum(0)


def _outside_modes() -> contextlib.AbstractContextManager[Any]:
    return _disable_current_modes() if rules.inside_dispatch_mode() else contextlib.nullcontext()


def _static_part(value: Any, dynamic: tuple[int, ...]) -> Any:
    if isinstance(value, Tensor):
        # Inductor specialises sizes 0 and 1, so each is a variant.
        return value.dtype, tuple(-1 if i in dynamic and n > 1 else n for i, n in enumerate(value.shape))
    return type(value), value  # 1, 1.0 and True are equal, and compile differently


def _marked(value: Any, dynamic: tuple[int, ...]) -> Any:
    if not isinstance(value, Tensor):
        return value
    fresh = value.detach().view(value.shape)  # the mark is an attribute: never put it on the caller's tensor
    for dim in dynamic:
        if value.shape[dim] > 1:
            torch._dynamo.mark_dynamic(fresh, dim)
    return fresh


PATIENCE = 4.0
"""Seconds after which a wait for the compiler is explained: more than what is found in the cache takes."""

_explained = False


@contextlib.contextmanager
def building(name: str) -> Iterator[None]:
    """Around a build: how long it took is information; the first that keeps its caller waiting is a warning.

    So the warning is seen where something is really built, once, and by the first process of several.
    """
    start = time.perf_counter()
    waiting = threading.Timer(PATIENCE, _explain, (name,))
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()
    logger.info("compiled %s in %.1f s", name, time.perf_counter() - start)


def _explain(name: str) -> None:
    global _explained
    if not _explained and os.environ.get("RANK", "0") == "0":
        _explained = True
        where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "PyTorch's cache folder")
        logger.warning(
            "compiling %s and its like for this CPU, about 15 s; the next process finds it in %s", name, where
        )
