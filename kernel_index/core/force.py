"""What overrules the backend that a caller asks for: ``with ki.force(...)``, and variables of the environment."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

PUBLIC: dict[str, Callable[..., Any]] = {}
"""The public functions by name, filled by the package's front: what ``explain`` and ``force`` take names of."""


class _Thread(threading.local):
    """The ``force`` blocks that this thread is in, innermost last: (ops or () for all, backend).

    Dynamo reads the attribute in the calling thread, guards on its content, and so retraces once for each setting.
    """

    def __init__(self):
        self.forced: tuple[tuple[tuple[str, ...], str], ...] = ()


_THREAD = _Thread()
_FORCED_KEY = "kernel_index.force"  # in PyTorch's thread state, which autograd hands on to the threads of a backward
_EVER_FORCED = False
BY_FORCE = "ki.force"

STRICT = [0, 0]
"""How many ``strict()`` blocks are open, and the environment's; a list so that Dynamo guards on its content."""

_FORCED: dict[str, tuple[str, str]] = {}  # op, or "" for every op -> (backend, the variable that says so)


def reload_environment() -> None:
    """Read ``KERNEL_INDEX_BACKEND[_<OP>]`` and ``KERNEL_INDEX_STRICT`` again; they are read once, at import."""
    _FORCED.clear()
    prefix = "KERNEL_INDEX_BACKEND"
    for name, backend in sorted(os.environ.items()):
        if backend and (name == prefix or name.startswith(prefix + "_")):
            _FORCED[name[len(prefix) + 1 :].lower()] = (backend, name)
    STRICT[1] = int(os.environ.get("KERNEL_INDEX_STRICT", "") not in ("", "0"))


reload_environment()


@contextlib.contextmanager
def force(backend: str, *ops: str) -> Iterator[None]:
    """Inside the block every op runs this backend, or those that are named: what ``KERNEL_INDEX_BACKEND`` does.

    Blocks nest; the innermost one that speaks of an op decides, and it goes before the environment and the argument.
    It holds for the thread that entered it, for the backward passes and recomputations that are run inside the block
    (on whichever thread autograd runs them), and for compiled code, which is traced once for each setting.  The layers
    of ``ki.nn`` recompute as their forward pass ran, wherever ``backward()`` is called.  Any other checkpoint is
    recomputed by the blocks around ``backward()``: keep it inside.

    Args:
        backend: a backend's name.  ``"reference"`` runs plain PyTorch all the way down: routers and selections too.
        ops: names of public functions; none for every op.

    Raises:
        TypeError: a name is no string.
        ValueError: an op is no public function, or the backend's name is empty.

    >>> import torch, kernel_index as ki
    >>> with ki.receipts() as log, ki.force("reference"):
    ...     _ = ki.fused_relu_squared(torch.ones(1 << 20))
    >>> log[0].ran, log[0].forced_by
    ('reference', 'ki.force')
    """
    for name, value in (("backend", backend), *(("ops", op) for op in ops)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if not backend:
        raise ValueError("backend must be the name of a backend, got ''")
    for op in ops:
        if op not in PUBLIC:
            raise ValueError(f"ops must be names of public functions of kernel_index, got {op!r}")
    global _EVER_FORCED
    _EVER_FORCED = True
    before = forced_here()
    _set_forced((*before, (ops, backend)))
    try:
        yield
    finally:
        _set_forced(before)


def forced_here() -> tuple[tuple[tuple[str, ...], str], ...]:
    """The ``force`` blocks in force in this thread, for an ``autograd.Function`` to keep for its backward."""
    if _THREAD.forced or not _EVER_FORCED:
        return _THREAD.forced
    return torch._C._get_obj_in_tls(_FORCED_KEY) if torch._C._is_key_in_tls(_FORCED_KEY) else ()


@contextlib.contextmanager
def resumed(forced: tuple[tuple[tuple[str, ...], str], ...]) -> Iterator[None]:
    """Inside the block, the ``force`` blocks that ``forced_here`` returned: for what a backward pass recomputes."""
    before = forced_here()
    if forced == before:
        yield
        return
    _set_forced(forced)
    try:
        yield
    finally:
        _set_forced(before)


def _set_forced(forced: tuple[tuple[tuple[str, ...], str], ...]) -> None:
    _THREAD.forced = forced
    torch._C._stash_obj_in_tls(_FORCED_KEY, forced)


def forced_for(op: str) -> tuple[str, str] | None:
    """(backend, what says so) for an op, or None."""
    blocks = _THREAD.forced if torch.compiler.is_compiling() else forced_here()
    for ops, backend in reversed(blocks):
        if not ops or op in ops:
            return backend, BY_FORCE
    return _FORCED.get(op) or _FORCED.get("")
