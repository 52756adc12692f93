"""One entry of the index, and what this tree says about it.

Whether an entry is implemented, which backends it has and by which rules they decline is read from the functions
themselves, so it cannot go stale.  Importing this module imports no kernel.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import kernel_index
from kernel_index.core.dispatch import Backend
from kernel_index.core.target import machine_why_not
from kernel_index.index.rule_sentences import sentences

ROOT = Path(__file__).parent.parent
"""The folder of the package."""


@dataclass(frozen=True, slots=True)
class BackendState:
    """One backend of a function: its rules as sentences, and why this machine cannot run it, or None."""

    name: str
    machine: str | None
    rules: tuple[str, ...]
    advice: tuple[str, ...]  # rules that only "auto" obeys


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the index.

    ``folder`` is relative to the package and holds what belongs to the entry alone; ``functions`` are public names;
    ``used_by`` names objects of the package; ``seed`` says whether it is one of the seed's 20 entries; ``jax`` is the
    module that lists its backends for JAX arrays, relative to the package, or empty.
    """

    name: str
    family: str
    folder: str
    functions: tuple[str, ...]
    purpose: str
    used_by: tuple[str, ...]
    seed: bool = False
    jax: str = ""

    @property
    def implemented(self) -> bool:
        """Whether the package exports every function of the entry."""
        return not self.missing()

    def missing(self) -> tuple[str, ...]:
        """The public functions that the tree does not have yet."""
        return tuple(name for name in self.functions if name not in kernel_index.__all__)

    def tables(self) -> dict[tuple[str, ...], tuple[BackendState, ...]]:
        """The backends in the order in which ``auto`` tries them, for the functions that share a table.

        Functions without backends are left out.  ``jax.<function>`` stands for the table of JAX arrays.
        """
        sharing: dict[tuple[Backend, ...], list[str]] = {}
        for name, function in self._functions().items():
            if table := _table_of(function):
                sharing.setdefault(table, []).append(name)
        if self.jax and self.implemented:  # read without importing JAX
            table = importlib.import_module(f"kernel_index.{self.jax}").JAX_BACKENDS
            sharing.setdefault(table, []).append(f"jax.{self.functions[0]}")
        return {tuple(names): tuple(map(_state_of, table)) for table, names in sharing.items()}

    def backends(self) -> tuple[str, ...]:
        """The names of all backends of all functions, each once; the reference is the last."""
        names = dict.fromkeys(b.name for table in self.tables().values() for b in table)
        return tuple(sorted(names, key=lambda name: name == "reference"))

    def docstrings(self) -> dict[str, str]:
        """The public functions' contracts, by name."""
        return {name: inspect.getdoc(function) or "" for name, function in self._functions().items()}

    def signatures(self) -> dict[str, str]:
        """The public functions' calls, as they are written."""
        return {name: _signature(function) for name, function in self._functions().items()}

    def modules(self) -> tuple[str, ...]:
        """The modules that define the functions, each once; most entries have one, their folder's ``api``."""
        return tuple(dict.fromkeys(function.__module__ for function in self._functions().values()))

    def users(self) -> dict[str, bool]:
        """Where the entry is meant to be used, and whether this tree already uses it there."""
        return {name: self._is_used_by(name) for name in self.used_by}

    def _is_used_by(self, dotted: str) -> bool:
        """Whether the module or package defines the name and calls the entry; the source is read, not imported."""
        package, _, name = dotted.rpartition(".")
        own, place = ROOT / self.folder, ROOT.joinpath(*package.split("."))
        module = place.with_suffix(".py")
        files = [module] if module.is_file() else [f for f in place.rglob("*.py") if own not in f.parents]
        source = "\n".join(f.read_text() for f in files)
        calls = "|".join(self.functions)
        called = rf"\b({calls})\(|\bchoose\(\"({calls})\""  # by its name, or as a part of another call
        return bool(re.search(rf"^(class|def) {name}\b", source, re.MULTILINE) and re.search(called, source))

    def _functions(self) -> dict[str, Callable[..., Any]]:
        """The public functions by name; none before all of them are there."""
        return {} if self.missing() else {name: getattr(kernel_index, name) for name in self.functions}


def _table_of(function: Callable[..., Any]) -> tuple[Backend, ...]:
    """The table that a function chooses from, read from its code; empty without one.

    Of several it is the one whose name ends in BACKENDS: the others are of its router, or of another function.
    """
    found = dict(_tables_in(inspect.unwrap(function), set()))
    named = [name for name in found if name.endswith("BACKENDS")]
    return found[(named or list(found))[0]] if found else ()


def _tables_in(function: Any, seen: set[Any]) -> Iterator[tuple[str, tuple[Backend, ...]]]:
    """The tables that the code of a function and of its module's other functions names."""
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, tuple) and value and all(isinstance(v, Backend) for v in value):
            yield name, value
        elif getattr(value, "__module__", None) == function.__module__:
            yield from _tables_in(value, seen)


def _state_of(backend: Backend) -> BackendState:
    advice = () if backend.not_worth is None else sentences(backend.not_worth)
    return BackendState(backend.name, machine_why_not(backend.name), sentences(backend.why_not), advice)


def _signature(function: Callable[..., Any]) -> str:
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()
    ]
    return f"{function.__name__}{inspect.Signature(parameters)}"
