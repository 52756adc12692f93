"""Replacements on one model instance that can be undone, and the report line of each."""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

LEVEL = 16 * torch.finfo(torch.float32).eps
"""Relative to the largest element: a dozen float32 operations agree with their formula to this."""


Kind = Literal["norms", "rope", "loss", "experts", "attention", "numerics"]


@dataclass(frozen=True, slots=True)
class Change:
    """The result for one module: ``by`` names the function that now computes it; if it is empty, ``why`` is the reason.

    ``kind`` is the option of ``apply`` that the module belongs to; ``when`` limits a replacement to some calls.
    """

    module: str
    kind: Kind
    by: str = ""
    why: str = ""
    when: str = ""

    @property
    def replaced(self) -> bool:
        return bool(self.by)


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned change: ``do()`` makes it and returns its undo function; None if the module is not replaced."""

    change: Change
    do: Callable[[], Callable[[], None]] | None = None


ALREADY = "its forward has been replaced by something else"


RAISED = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
"""What code of other people raises where it is called with something that it was not made for."""


def tried(name: str, kind: Kind, planner: Callable[[], Plan]) -> Plan:
    """The plan of ``planner``, or "left" with the reason where a trial raises.

    A trial runs code of other people: what it raises must not stop the other plans.
    """
    try:
        return planner()
    except RAISED as error:
        line = str(error).strip().split("\n")[0][:120]
        return Plan(Change(name, kind, why=f"could not be tried: {type(error).__name__}: {line}"))


class Recipe(NamedTuple):
    """How a forward is made: ``make(base, *settings)`` returns it for a module whose class is ``base``.

    Both parts can be pickled, so a patched module can be.
    """

    make: Callable[..., Callable[..., Any]]
    settings: tuple[Any, ...] = ()


UNDONE = "_kernel_index_is_undone"


@functools.cache
def patched_class(base: type, recipe: Recipe) -> type:
    """A subclass of ``base`` with another forward, and with its name.

    An instance whose class is replaced behaves as before for everything that copies, pickles, wraps, shards,
    replicates or compiles modules; a forward stored in the instance does not.
    """
    ours = recipe.make(base, *recipe.settings)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if UNDONE in self.__dict__ or not isinstance(self, ours_class):  # somebody has kept this bound method
            return base.forward(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _rebuilt, (base, recipe), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    members = {"forward": forward, "__reduce_ex__": reduce_ex, "__doc__": base.__doc__, "__module__": base.__module__}
    ours_class = type(base.__name__, (base,), members)
    ours_class.__qualname__ = base.__qualname__
    return ours_class


def _rebuilt(base: type, recipe: Recipe) -> nn.Module:
    # It makes our attention known, in a process that has loaded a patched model and maybe nothing else of ours.
    importlib.import_module("kernel_index.integrations.transformers")
    return object.__new__(patched_class(base, recipe))


def replace_forward(module: nn.Module, recipe: Recipe) -> Callable[[], None]:
    """Give one instance another forward and return the function that removes it."""
    base = type(module)
    vars(module).pop(UNDONE, None)
    ours = patched_class(base, recipe)
    module.__class__ = ours

    def undo() -> None:
        if type(module) is ours:
            module.__class__ = base
        else:  # something made a class of its own from ours, as FSDP does
            vars(module)[UNDONE] = True

    return undo


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether the forward has one parameter; a second one, also an optional one, has a meaning that we do not know."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def twin(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """The same module with other parameters, to try its forward without changing it; no weight is copied."""
    other = copy.copy(module)
    ours = {n: nn.Parameter(v, requires_grad=False) for n, v in parameters.items()}
    other.__dict__["_parameters"] = {**dict.fromkeys(module._parameters), **ours}  # a bias that is None stays None
    return other


def agree(actual: Any, expected: Tensor) -> bool:
    """Whether the result of a probe equals that of the formula."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    return bool((actual.double() - expected).abs().max() <= LEVEL * expected.abs().max())


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values on the CPU, drawn without the global generator."""
    make = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64, device="cpu").to(dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which is judged when it is called in training."""
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
