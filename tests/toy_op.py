"""An op whose backends multiply by 10, 20 and 30, so that a result shows who made it."""

import torch

from kernel_index.core import checks
from kernel_index.core.dispatch import Backend, always, choose

asked: list[str] = []  # backends whose rule was read, in eager mode
ran: list[str] = []  # backends that ran, in eager mode


class PredicateError(Exception):
    """A bug in a rule."""


class LaunchError(RuntimeError):
    """A kernel that could not be launched."""


predicate_error = PredicateError("a bug in a rule")


def _note(notes: list[str], name: str) -> None:
    if not torch.compiler.is_compiling():
        notes.append(name)


def even_why_not(x):
    _note(asked, "even")
    return "needs an even width" if x.shape[-1] % 2 else None


def large_why_not(x):
    _note(asked, "large")


def large_not_worth(x):
    return "too small to pay" if x.shape[0] < 2 else None


def _times(name: str, factor: float):
    def multiply(x):
        _note(ran, name)
        return x * factor

    return multiply


EVEN = Backend("even", even_why_not, _times("even", 10.0))
LARGE = Backend("large", large_why_not, _times("large", 20.0), large_not_worth)
REFERENCE = Backend("reference", always, _times("reference", 30.0))
BACKENDS = (EVEN, LARGE, REFERENCE)


def toy(x, *, backend="auto"):
    checks.is_floating("x", x)
    return choose("toy", BACKENDS, backend, x).run(x)


def without_reference(x):
    return choose("toy", (EVEN, LARGE), "auto", x).run(x)


def _raise(*_):
    if torch.compiler.is_compiling():  # Dynamo cannot trace the raise of an exception made elsewhere
        raise PredicateError("a bug in a rule")
    raise predicate_error


def bad_rule(x):
    return choose("toy", (Backend("bad", _raise, _times("bad", 0.0)), REFERENCE), "auto", x).run(x)


def bad_advice(x):
    return choose("toy", (Backend("bad", always, _times("bad", 0.0), _raise), REFERENCE), "auto", x).run(x)


def bad_details(x):
    return choose("toy", (Backend("bad", always, _times("bad", 0.0), None, _raise), REFERENCE), "auto", x).run(x)


def failing(x, error):
    def launch(x):
        raise error

    odd = Backend("even", lambda x: "needs an even width", _times("even", 10.0))
    return choose("toy", (odd, Backend("fails", always, launch), REFERENCE), "auto", x).run(x)


def detailed(x):
    def details(x):
        return (("rows", x.shape[0]), ("path", "even"))

    return choose("toy", (Backend("even", always, _times("even", 10.0), None, details),), "auto", x).run(x)


def detailed_statically(x):
    return choose("toy", (Backend("even", always, EVEN.run, None, lambda x: (("path", "even"),)),), "auto", x).run(x)
