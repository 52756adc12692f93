"""Pick a backend, say why, and remember it.  Three nouns -- Backend, Receipt, Ineligible -- and ``choose``.

``choose`` is the only decision point of the library: nothing after it falls back, and a launch that fails raises.
Everything here also runs while ``torch.compile`` traces, so it reads plain module globals and never a ContextVar.
"""

import contextlib
import platform
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kernel_index.core.autocast import without_autocast
from kernel_index.core.force import PUBLIC, STRICT, forced_for
from kernel_index.core.locks import ThreadLock
from kernel_index.core.numerics import NO_RECIPE, Ineligible, Recipe, is_invariant
from kernel_index.core.refusal import refusal
from kernel_index.core.rounding import round_graph
from kernel_index.core.rules import triton_not_worth
from kernel_index.core.target import target_of
from kernel_index.core.version import __version__


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run an op.

    ``why_not(*call)`` returns None when the backend can run the call, else the broken rule, as a fixed sentence.
    ``not_worth(*call)`` is the same for calls it can run but should not be picked for by ``"auto"``.
    ``details(*call)`` returns the op's own telemetry for the receipt, as pairs.
    An op with many arguments puts them into one NamedTuple, its ``Call``, which is then all that ``*call`` holds.
    All three read metadata only (shape, dtype, device, strides, grad mode); none reads a value or synchronises.
    ``not_worth`` may also ask whether a kernel has been compiled (``native.once_built``).
    ``invariant`` is the recipe of a backend that computes each row by itself; ``numerics("invariant")`` takes no other.
    Those of one op and one kind of device have the same recipe.
    """

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]
    not_worth: Callable[..., str | None] | None = None
    details: Callable[..., tuple[tuple[str, Any], ...]] | None = None
    invariant: Recipe | None = None


REFERENCES = ("reference", "xla")
"""The last backend of a table: torch's, and the one for JAX arrays, which ``"reference"`` means there."""


def always(*_: Any) -> None:
    """The rule of a backend that runs every legal call."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was asked for, what ran, and the rule that turned every earlier backend away.

    ``ran`` is empty when the chosen backend raised; ``tried`` then names it and ``error`` says what it raised.
    ``forced_by`` names what overruled the request: the environment variable, or ``ki.force``.  ``details`` is the op's
    own telemetry.  ``numerics`` is the hash of the recipe by which the backend computed each row under
    ``numerics("invariant")``, and empty in ordinary mode.
    Inside ``torch.compile`` a receipt is written when the call is traced: one per trace, not one per run.  After a
    graph break Dynamo traces the same frame again from its start, which writes again.

    >>> import torch, kernel_index as ki
    >>> with ki.receipts() as log:
    ...     _ = ki.fused_relu_squared(torch.ones(3))
    >>> log[0].requested, log[0].ran, log[0].error
    ('auto', 'reference', None)
    >>> dict(log[0].declined)["inductor"]
    'too small for a compiled region to pay'
    """

    op: str
    requested: str
    ran: str
    declined: tuple[tuple[str, str], ...] = ()
    forced_by: str | None = None
    tried: str = ""
    error: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    numerics: str = ""

    @property
    def routed_by(self) -> str:
        """The backend that chose the blocks or tokens of a routed attention; empty for ops that route nothing."""
        return self.details.get("routed_by", "")


class ReceiptLog(list[Receipt]):
    """The receipts of a ``with receipts()`` block, in order; ``thread`` is the only one it listens to, if any."""

    def __init__(self, thread: int | None = None):
        super().__init__()
        self.thread = thread

    def counts(self) -> Counter[Receipt]:
        """How often each distinct receipt occurs."""
        return Counter(self)

    @property
    def versions(self) -> dict[str, str]:
        """What the receipts were written by: of the index, Python and PyTorch, and of Triton where it was loaded."""
        versions = {"kernel-index": __version__, "python": platform.python_version()}
        loaded = {name: sys.modules.get(name) for name in ("torch", "triton")}
        return versions | {name: module.__version__ for name, module in loaded.items() if module is not None}


_LOGS: list[ReceiptLog] = []  # replaced and never changed, so that a thread may go through it while others enter
_BLOCKS = ThreadLock()  # entering and leaving a block: read, change and write back, by one thread at a time
ACCELERATORS: list[Callable[[tuple], bool]] = []
"""Ask whether a call's arrays are on an accelerator; one for each array library beside PyTorch that is in use."""


_EXPLAINING: set[int] = set()  # idents of the threads inside explain()


def is_watched() -> bool:
    """Whether someone collects receipts, or asks ``explain``."""
    return bool(_LOGS or _EXPLAINING)


@contextlib.contextmanager
def receipts(*, every_thread: bool = True) -> Iterator[ReceiptLog]:
    """Collect a receipt for every dispatched call inside the block.

    Autograd recomputes checkpoints of a GPU in threads of its own, so the calls of every thread are collected.  Where
    several threads serve requests, ``every_thread=False`` collects those of the thread that opened the block.

    >>> import torch, kernel_index as ki
    >>> with ki.receipts() as log:
    ...     _ = ki.fused_relu_squared(torch.ones(3))
    >>> log[0].op, log[0].requested, log[0].ran
    ('fused_relu_squared', 'auto', 'reference')
    """
    log = ReceiptLog(None if every_thread else threading.get_ident())
    global _LOGS
    with _BLOCKS.held():
        _LOGS = [*_LOGS, log]
    try:
        yield log
    finally:
        with _BLOCKS.held():
            _LOGS = [other for other in _LOGS if other is not log]


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Inside the block, falling back to ``reference`` on an accelerator raises instead of running slowly.

    A reference that is asked for by name still runs: it is no fallback.  ``KERNEL_INDEX_STRICT=1`` is the same, for
    the whole process.

    >>> import torch, kernel_index as ki
    >>> with ki.strict():
    ...     ki.fused_relu_squared(torch.ones(2))  # a CPU is no accelerator
    tensor([1., 1.])
    """
    with _BLOCKS.held():
        STRICT[0] += 1
    try:
        yield
    finally:
        with _BLOCKS.held():
            STRICT[0] -= 1


def _write(op: str, requested: str, tried: str, declined, forced_by, details, numerics: str, error=None) -> bool:
    if _LOGS:
        ran = "" if error else tried
        receipt = Receipt(op, requested, ran, declined, forced_by, tried, error, dict(details), numerics)
        _take_back_restarted(receipt)
        for log in _LOGS:
            if log.thread is None or log.thread == threading.get_ident():
                log.append(receipt)
    return True


_TRACING: list[Any] = [None, 0, []]  # Dynamo's compile context, its attempt, the receipts written during it


def _take_back_restarted(receipt: Receipt) -> None:
    """Dynamo may start a trace over (it does when a Python float turns out to steer a branch): one receipt is left."""
    context = torch._guards.CompileContext.try_get()
    if context is None:
        return
    if _TRACING[0] is not context or _TRACING[1] != context.attempt:
        abandoned = _TRACING[2] if _TRACING[0] is context else []
        for log in _LOGS:
            log[:] = [r for r in log if not any(r is other for other in abandoned)]
        _TRACING[:] = [context, context.attempt, []]
    _TRACING[2].append(receipt)


# What torch.compiler.assume_constant_result does, without its 1.3 s import of torch._dynamo: Dynamo runs the function
# as plain Python while it traces and stores the result, so there is no guard and no graph break.
_write._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(slots=True)  # not frozen: one is made for every call, and freezing makes that four times as slow
class Choice:
    """A decision of ``choose``; ``run`` carries it out and writes the receipt."""

    op: str
    requested: str
    backend: Backend
    declined: tuple[tuple[str, str], ...]
    forced_by: str | None
    details: tuple[tuple[str, Any], ...]
    wanted: str = "auto"  # what decided: the request, or what overruled it
    numerics: str = ""  # the hash of the recipe, under numerics("invariant")

    @property
    def below(self) -> str:
        """What to ask of the choices that this one depends on: the reference is the reference all the way down."""
        return "reference" if self.wanted in REFERENCES else "auto"

    def choose(self, op: str, backends: tuple[Backend, ...], *call: Any) -> "Choice":
        """Decide a part of this call, its router for example; ``run_inside`` then carries that out."""
        return _choose(op, backends, self.below, forced_for(op, inside=True), call)

    def run_inside(self, *args: Any) -> Any:
        """Carry out a part of another call, which writes the one receipt.

        Autocast is off: what it means for an op's arguments was decided when they were checked.
        """
        like = _first_tensor(args)
        with contextlib.nullcontext() if like is None else without_autocast(like):
            return self.backend.run(*args)

    def _run_named(self, *args: Any) -> Any:
        """Under a name in the profiler's trace, where a native kernel would not be seen at all."""
        with torch.profiler.record_function(f"ki.{self.op}[{self.backend.name}]"):
            return self.run_inside(*args)

    def with_details(self, **details: Any) -> "Choice":
        """The same decision with more telemetry."""
        return replace(self, details=(*self.details, *details.items()))

    def run(self, *args: Any) -> Any:
        decision = (
            self.op,
            self.requested,
            self.backend.name,
            self.declined,
            self.forced_by,
            self.details,
            self.numerics,
        )
        if torch.compiler.is_compiling():
            round_graph(self.numerics)
            out = self.run_inside(*args)
            _write(*decision)  # after it: a launch that cannot be traced is not said to have run
            return out
        try:
            out = (self._run_named if torch.autograd._profiler_enabled() else self.run_inside)(*args)
        except BaseException as error:  # re-raised: a failed launch is the caller's to see, and the receipt's to tell
            _write(*decision, error=None if _ends_a_recomputation(error) else f"{type(error).__name__}: {error}")
            raise
        if _LOGS:
            _write(*decision)
        return out


def _ends_a_recomputation(error: BaseException) -> bool:
    """A checkpoint stops its recomputation by an exception inside the last op it needs: that op has run."""
    return type(error).__name__ == "_StopRecomputationError"


class _Explained(Exception):
    """Carries the decision out of a public function that ``explain`` called; never seen by a user."""

    def __init__(self, explanation: "Explanation"):
        self.explanation = explanation


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would do.  ``would_run`` is None when it would raise ``Ineligible``.

    ``verdicts`` holds, for every backend of the op, None when it could run the call, else the rule it breaks.

    >>> import torch, kernel_index as ki
    >>> explanation = ki.explain("fused_relu_squared", torch.ones(3))
    >>> explanation.would_run, explanation.verdicts["inductor"]
    ('reference', 'too small for a compiled region to pay')
    """

    op: str
    requested: str
    would_run: str | None
    verdicts: Mapping[str, str | None]
    forced_by: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.op}: backend={self.requested!r} would run {self.would_run or 'nothing: Ineligible'}"
        return "\n".join([head, *(f"  {name}: {rule or 'can run'}" for name, rule in self.verdicts.items())])


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would use and what speaks against each, without running it.

    The call goes through the very check and the very decision of the real one and stops before the launch; a call that
    the op refuses raises here as it would there.

    >>> import torch, kernel_index as ki
    >>> ki.explain("fused_relu_squared", torch.ones(3)).would_run
    'reference'
    """
    if isinstance(op, str):
        function = PUBLIC.get(op)
        if function is None:
            raise ValueError(f"op must be the name of a public function of kernel_index, got {op!r}")
    else:
        function = op
    thread = threading.get_ident()
    _EXPLAINING.add(thread)
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _EXPLAINING.discard(thread)
    raise ValueError(f"op must be a function with backends, got {op!r}: it ran without choosing one")


def choose(op: str, backends: tuple[Backend, ...], requested: str, *call: Any) -> Choice:
    """Take the first eligible backend in table order; a named backend either runs or raises ``Ineligible``."""
    return _choose(op, backends, requested, forced_for(op), call)


def _choose(
    op: str, backends: tuple[Backend, ...], requested: str, forced: tuple[str, str] | None, call: tuple
) -> Choice:
    wanted, forced_by = forced if forced else (requested, None)
    if wanted == "reference" and backends[-1].name in REFERENCES:
        wanted = backends[-1].name
    if _EXPLAINING and threading.get_ident() in _EXPLAINING:
        raise _Explained(_explanation(op, backends, requested, wanted, forced_by, call))
    declined: tuple[tuple[str, str], ...] = ()
    invariant = is_invariant()
    for backend in backends:
        if wanted != "auto" and wanted != backend.name:
            continue
        rule = _verdict(backend, wanted, call, invariant)
        if rule is None:
            details = () if backend.details is None else backend.details(*call)
            recipe = backend.invariant.hash if invariant and backend.invariant is not None else ""
            return Choice(op, requested, backend, declined, forced_by, details, wanted, recipe)
        declined += ((backend.name, rule),)
    raise Ineligible(refusal(op, backends, wanted, forced_by, declined))


def _verdict(backend: Backend, wanted: str, call: tuple, invariant: bool) -> str | None:
    if invariant:  # no rule of speed, and no fallback
        rule = NO_RECIPE if backend.invariant is None else backend.why_not(*call)
        interpreted = rule is None and wanted == "auto" and backend.name == "triton"
        return triton_not_worth(_first_tensor(call)) if interpreted else rule
    rule = backend.why_not(*call)
    if rule is None and wanted == "auto":
        if backend.not_worth is not None:
            rule = backend.not_worth(*call)
        if rule is None and (STRICT[0] or STRICT[1]) and backend.name in REFERENCES and _on_accelerator(call):
            rule = "strict mode: a fallback to the reference on an accelerator is an error"
    return rule


def _on_accelerator(call: tuple) -> bool:
    tensor = _first_tensor(call)
    if tensor is not None:
        return target_of(tensor.device).kind != "cpu"
    return any(ask(call) for ask in ACCELERATORS)


def _first_tensor(call: tuple) -> torch.Tensor | None:
    """A tensor on the device where the call runs; None for arrays of another library."""
    for value in call:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):  # a Call
            return value[0]
    return None


def _explanation(op, backends, requested, wanted, forced_by, call) -> Explanation:
    verdicts = {b.name: _verdict(b, wanted, call, is_invariant()) for b in backends}
    chosen = next((b for b in backends if verdicts[b.name] is None and wanted in ("auto", b.name)), None)
    details = dict(chosen.details(*call)) if chosen and chosen.details else {}
    return Explanation(op, requested, chosen.name if chosen else None, verdicts, forced_by, details)
