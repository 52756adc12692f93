"""Code that Inductor compiles in ``numerics("invariant")`` rounds as it is written.

By itself Inductor keeps float32 between fused operators on bfloat16, and contracts products and sums on a GPU.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def _inductor() -> Any:
    """Its settings, if something has loaded it."""
    return sys.modules.get("torch._inductor.config")


@contextlib.contextmanager
def rounding_as_written() -> Iterator[None]:
    """For what is compiled inside the block.  A trace inside of it asks for its graph alone, by ``round_graph``."""
    if torch.compiler.is_compiling():
        round_graph("here")
        yield
        return
    before = _inductor() is not None and _inductor().emulate_precision_casts
    if _inductor() is not None:
        _inductor().emulate_precision_casts = True
    try:
        yield
    finally:
        if _inductor() is not None:
            _inductor().emulate_precision_casts = before


_GRAPHS: set[str] = set()
"""Dynamo's names of the graphs that were traced in the mode: their backward passes are compiled when they first run."""

_BEFORE: list[bool] = []
"""The setting that comes back when the compilation that runs has ended; Dynamo compiles one graph at a time."""


def round_graph(recipe: str) -> None:
    """From within a trace: for the graph that is being traced, and for its backward pass, wherever that is compiled.

    Inductor compiles the graph after the trace has left the block.  Dynamo runs this as it is.
    """
    if not recipe:
        return
    from torch._dynamo.callback import callback_handler

    if _ends not in callback_handler.end_callbacks:  # also after torch._dynamo.reset(), which forgets its graphs
        callback_handler.register_start_callback(_begins)
        callback_handler.register_end_callback(_ends)
        _GRAPHS.clear()
        _BEFORE.clear()
    _GRAPHS.add(str(torch._guards.CompileContext.current_compile_id()))
    _switch_on()


round_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _switch_on() -> None:
    import torch._inductor.config as settings  # it may be loaded between the trace and the compilation

    if not _BEFORE:
        _BEFORE.append(settings.emulate_precision_casts)
    settings.emulate_precision_casts = True


def _begins(compilation: Any) -> None:
    if compilation.callback_trigger.name == "LAZY_BACKWARD" and compilation.compile_id in _GRAPHS:
        _switch_on()


def _ends(_: Any) -> None:
    if _BEFORE:
        _inductor().emulate_precision_casts = _BEFORE.pop()
