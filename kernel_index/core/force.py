"""What overrules the backend that a caller asks for: ``with ki.force(...)``, and variables of the environment."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch

PUBLIC: dict[str, Callable[..., Any]] = {}
"""The public functions by name, filled by the package's front: what ``explain`` and ``force`` take names of."""


class Block(NamedTuple):
    """One ``force`` block: the ops it speaks of, () for all; and the checkpointed function around it, if any."""

    ops: tuple[str, ...]
    backend: str
    frame: Any = None


Blocks = tuple[Block, ...]
"""Innermost last."""


class _Thread(threading.local):
    """The blocks that this thread is in, for compiled code.

    Dynamo reads the attribute in the calling thread, guards on its content, and so retraces once for each setting.
    """

    def __init__(self):
        self.forced: tuple[tuple[tuple[str, ...], str], ...] = ()


_THREAD = _Thread()
_KEY = "kernel_index.force"  # in PyTorch's thread state, which autograd hands on to the threads of a backward
_EVER_FORCED = False
BY_FORCE = "ki.force"

STRICT = [0, 0]
"""How many ``strict()`` blocks are open, and the environment's; a list so that Dynamo guards on its content."""

NUMERICS = "<numerics>"
"""The op that a block of ``numerics`` speaks of; no function has this name."""

_NUMERICS = ["ordinary"]  # the environment's; a list so that Dynamo guards on its content

_FORCED: dict[str, tuple[str, str]] = {}  # op, or "" for every op -> (backend, the variable that says so)


def reload_environment() -> None:
    """Read our variables again: ``…_BACKEND[_<OP>]``, ``…_STRICT`` and ``…_NUMERICS``; import reads them once."""
    _FORCED.clear()
    _NUMERICS[0] = os.environ.get("KERNEL_INDEX_NUMERICS", "") or "ordinary"
    if _NUMERICS[0] not in ("ordinary", "invariant"):
        raise ValueError(f"KERNEL_INDEX_NUMERICS must be 'invariant' or 'ordinary', got {_NUMERICS[0]!r}")
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
    It holds for the thread that entered it and for the threads that autograd runs its backward passes on; for the
    backward and the recomputation of calls made inside (by ``torch.utils.checkpoint(…, use_reentrant=False)``, and
    where ``backward()`` itself is called inside, any other); and for compiled code, which is traced once for each
    setting.  Other threads are not touched.

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
    with in_block(*ops, backend=backend):
        yield


@contextlib.contextmanager
def in_block(*ops: str, backend: str) -> Iterator[None]:
    """A ``force`` block for these ops, () for all; unchecked."""
    global _EVER_FORCED
    if torch.compiler.is_compiling():
        with _in_traced_block((ops, backend)):
            yield
        return
    _EVER_FORCED = True
    with resumed((*forced_here(), Block(ops, backend, checkpoint_frame()))):
        yield


@contextlib.contextmanager
def _in_traced_block(block: tuple[tuple[str, ...], str]) -> Iterator[None]:
    """A block inside of a traced function: what the trace chooses is in the graph, and nothing is left to do in a run.

    Dynamo keeps the attribute as a value of its own until the block ends.  Where it cannot trace what is inside, it
    runs the whole block as plain Python, which is no trace.
    """
    before = _THREAD.forced
    if before[-1:] != (block,):
        _THREAD.forced = (*before, block)
    try:
        yield
    finally:
        _THREAD.forced = before


def forced_here() -> Blocks:
    """The ``force`` blocks in force in this thread, for an ``autograd.Function`` to keep for its backward."""
    return _PLACES.get(_place(), ())  # () in a thread that outlives its block


_PLACES: dict[int, Blocks] = {0: ()}
_MODES: dict[int, str | None] = {0: None}
"""What the number in a thread's state stands for, while a block is open; and the mode of ``numerics`` among the blocks,
which every call asks for several times.

A number, since with PyTorch 2.11 a tuple that was there was found to be another object: as if its last reference had
been lost.  Numbers of closed blocks are given again.
"""

_FREE = list(range(255, 0, -1))  # numbers that Python keeps for ever


def _place() -> int:
    if not _EVER_FORCED or not torch._C._is_key_in_tls(_KEY):
        return 0
    return torch._C._get_obj_in_tls(_KEY)


def _distinct(blocks: Iterable[tuple[tuple[str, ...], str]]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Without a block directly inside of its like, which asks for nothing else: code is not traced anew for it."""
    found: list[tuple[tuple[str, ...], str]] = []
    for block in blocks:
        if found[-1:] != [block]:
            found.append(block)
    return tuple(found)


@contextlib.contextmanager
def resumed(blocks: Blocks) -> Iterator[None]:
    """Inside the ``with``, the blocks that ``forced_here`` returned elsewhere: for what a backward pass recomputes."""
    before, place = _THREAD.forced, _place()
    if blocks == forced_here():
        yield
        return
    own = _FREE.pop() if _FREE else max(_PLACES) + 1
    _THREAD.forced = _distinct((block.ops, block.backend) for block in blocks)
    _PLACES[own] = blocks
    _MODES[own] = next((block.backend for block in reversed(blocks) if NUMERICS in block.ops), None)
    torch._C._stash_obj_in_tls(_KEY, own)
    try:
        yield
    finally:
        _THREAD.forced = before
        torch._C._stash_obj_in_tls(_KEY, place)
        del _PLACES[own], _MODES[own]
        if own < 256:
            _FREE.append(own)


def forced_for(op: str, *, inside: bool = False) -> tuple[str, str] | None:
    """(backend, what says so) for an op, or None.

    ``inside``: the op is a part of another call, such as its router.  What forces every op then speaks of that other
    call, and of the part only where it asks for the reference.
    """
    if not torch.compiler.is_compiling():
        if _saved_tensor_hooks(False) is not None:
            _keep_for_recomputation(forced_here())
        if not _EVER_FORCED and not _FORCED:  # nearly every call: choosing one costs a few microseconds in all
            return None
    found, by_name = _forced_for(op)
    if found is None or (inside and not by_name and found[0] != "reference"):
        return None
    return found


def _forced_for(op: str) -> tuple[tuple[str, str] | None, bool]:
    """The same, and whether the op was named."""
    for ops, backend in reversed(_blocks()):
        if not ops or op in ops:
            return (backend, BY_FORCE), op in ops
    return _FORCED.get(op) or _FORCED.get(""), op in _FORCED


def numerics_here() -> str:
    """The mode of ``numerics`` in force in this thread."""
    if not (_EVER_FORCED or _THREAD.forced):  # a traced block is in the latter alone
        return _NUMERICS[0]
    if not torch.compiler.is_compiling():
        return _MODES.get(_place()) or _NUMERICS[0]
    for ops, mode in reversed(_THREAD.forced):
        if NUMERICS in ops:
            return mode
    return _NUMERICS[0]


def _blocks() -> tuple[tuple[tuple[str, ...], str], ...]:
    return _THREAD.forced if torch.compiler.is_compiling() else tuple((b.ops, b.backend) for b in forced_here())


_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def checkpoint_frame() -> Any:
    """PyTorch's record of the checkpointed function that runs here for the first time, or None.

    ``torch.utils.checkpoint`` has no hook that a library may register, but its saved-tensor hooks hold the record.
    """
    hooks = _saved_tensor_hooks(False)
    if hooks is None or not torch.is_grad_enabled() or not isinstance(hooks[0], FunctionType):
        return None
    pack = hooks[0]
    cells = zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True)
    frame = next((cell.cell_contents for name, cell in cells if name == "frame"), None)
    return frame if hasattr(frame, "recompute_fn") else None


def _keep_for_recomputation(blocks: Blocks) -> None:
    """Have a checkpointed function recomputed under the blocks that it was called in, and under no others.

    Also where there were none: another backend than that of the forward may save other tensors, which is an error.
    """
    frame = checkpoint_frame()
    if frame is None or hasattr(frame, _KEPT):
        return
    around = tuple(block for block in blocks if block.frame is not frame)  # the function enters the others by itself
    recompute = frame.recompute_fn

    def recompute_forced(*args: Any) -> Any:
        with resumed(around):
            return recompute(*args)

    frame.recompute_fn = recompute_forced
    setattr(frame, _KEPT, True)


_KEPT = "_kernel_index_force"
