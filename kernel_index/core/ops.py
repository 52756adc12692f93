"""Registers operators under ``kernel_index::``, each with a launcher and a fake."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kernel_index.core import ahead, force, rules
from kernel_index.core.locks import ThreadLock
from kernel_index.core.numerics import Ineligible, is_invariant
from kernel_index.core.triton.launch import interpreting


class Passes(NamedTuple):
    """What a backend gives to the autograd Function that all compiled backends of an op share."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, in a trace too where one tensor is two arguments, such as keys that are the values.

    Dynamo refuses such a call.  A view of the tensor is another argument with the same values, and autograd adds up the
    two gradients as it does in eager code.
    """
    if not torch.compiler.is_compiling():
        if not is_invariant():
            return function.apply(*args)
        return _in_its_mode(function).apply(*args)
    distinct: list[Any] = []
    for arg in args:
        twice = isinstance(arg, torch.Tensor) and any(arg is other for other in distinct)
        distinct.append(arg.view_as(arg) if twice else arg)
    return function.apply(*distinct)


@functools.cache
def _in_its_mode(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function with a backward pass in the blocks of its forward pass, wherever ``backward()`` is called.

    It refuses ``create_graph=True``: such a backward is PyTorch's, in its order of sums.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        ctx.blocks = force.forced_here()
        return function.forward(ctx, *args)

    def backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise Ineligible("backward of a call in numerics('invariant'): create_graph=True has no invariant form")
        if ctx.blocks is force.forced_here():  # nearly always, and a block costs a few microseconds
            return function.backward(ctx, *gradients)
        with force.resumed(ctx.blocks):
            return function.backward(ctx, *gradients)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": function.__module__}
    return type(function.__name__, (function,), members)


def are_seen() -> bool:
    """Whether something watches operators here: a trace, a dispatch mode or a transform of ``torch.func``."""
    if torch.compiler.is_compiling() or rules.inside_dispatch_mode() or rules.inside_functorch():
        return True
    return torch._C._get_tracing_state() is not None


def run_launcher(launch: Callable[..., Any], *args: Any) -> Any:
    """``launch(*args)``; one at a time under the interpreter."""
    return _one_at_a_time(launch)(*args) if interpreting() else launch(*args)


LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""Qualified name of each registered op -> its launcher."""


def register(
    schema: str, launch: Callable[..., Any], fake: Callable[..., Any], keys: tuple[str, ...] = ("CPU", "CUDA")
) -> Callable[..., Any]:
    """Define ``kernel_index::<schema>`` with a launcher and a fake, and return the function that calls it.

    ``define`` + ``impl`` rather than ``triton_op``: the latter neither traces nor passes ``opcheck`` under the
    interpreter.  Launcher and fake take their outputs from one ``allocate`` function, so that they cannot disagree.

    The op has an option of its own, ``in_mode``: what is traced in ``numerics("invariant")`` is launched in it,
    since the block may be a part of the graph, and its end may come before the backward pass.
    """
    name = schema.partition("(")[0]
    qualified = f"kernel_index::{name}"
    LAUNCHERS[qualified] = launch
    torch.library.define(qualified, _with_mode(schema[len(name) :]), tags=(torch.Tag.pt2_compliant_tag,))
    for key in keys:  # ROCm's key is CUDA
        torch.library.impl(qualified, key, _in_mode(launch if key == "CUDA" else _one_at_a_time(launch)))
    torch.library.register_fake(qualified, _in_mode(fake if keys == ("CPU",) else ahead.learning_from(launch, fake)))
    op = getattr(torch.ops.kernel_index, name).default

    def call(*args: Any) -> Any:
        return op(*args, in_mode=True) if torch.compiler.is_compiling() and is_invariant() else op(*args)

    call.op = op  # type: ignore[attr-defined]
    return call


def _with_mode(signature: str) -> str:
    arguments, arrow, results = signature.rpartition(" -> ")
    return f"{arguments[:-1]}{', ' if arguments != '()' else ''}*, bool in_mode=False){arrow}{results}"


def _in_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the option ``in_mode``, in invariant numerics."""

    @functools.wraps(function)
    def run_in_mode(*args: Any, in_mode: bool = False) -> Any:
        if not in_mode:
            return function(*args)
        with force.in_block(force.NUMERICS, backend="invariant"):
            return function(*args)

    return run_in_mode


def run(op: Callable[..., Any], launch: Callable[..., Any], *args: Any) -> Any:
    """``op(*args)``; on a GPU by its launcher, where nothing would see the op: its call costs 12 µs of the host."""
    return op(*args) if are_seen() or not args[0].is_cuda else launch(*args)


class NativeOp:
    """A registered op of a C++ kernel; it is called past PyTorch's dispatcher where nothing would see it."""

    def __init__(self, schema: str, launch: Callable[..., Any], fake: Callable[..., Any]):
        self.launch, self.op = launch, register(schema, launch, fake, ("CPU",))

    def __call__(self, *args: Any) -> Any:
        return self.op(*args) if are_seen() else self.launch(*args)


_INTERPRETER = ThreadLock()


def _one_at_a_time(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Lock the launcher on a CPU: Triton's interpreter keeps the running program's state in globals of all threads."""

    @functools.wraps(launch)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _INTERPRETER.held() if interpreting() else contextlib.nullcontext():
            return launch(*args, **kwargs)

    return alone
