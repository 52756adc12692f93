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
from types import ModuleType
from typing import Any

import kernel_index
from kernel_index.core.dispatch import Backend
from kernel_index.core.target import machine_why_not
from kernel_index.index.rule_sentences import sentences

ROOT = Path(__file__).parent.parent
"""The folder of the package."""


@dataclass(frozen=True, slots=True)
class BackendState:
    """One backend of an entry: its rules as sentences, and why this machine cannot run it, or None."""

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

    def backends(self) -> tuple[BackendState, ...]:
        """The backends in the order in which ``auto`` tries them; empty for metadata, which has none."""
        found: dict[str, BackendState] = {}
        for b in self._tables():
            rules = sentences(b.why_not)
            advice = () if b.not_worth is None else sentences(b.not_worth)
            if b.name in found:
                rules = tuple(dict.fromkeys(found[b.name].rules + rules))
                advice = tuple(dict.fromkeys(found[b.name].advice + advice))
            found[b.name] = BackendState(b.name, machine_why_not(b.name), rules, advice)
        return tuple(sorted(found.values(), key=lambda b: b.name == "reference"))

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

    def _tables(self) -> Iterator[Backend]:
        """Every backend of every table beside the functions; those for JAX arrays are read without importing JAX."""
        names = [*self.modules(), *([f"kernel_index.{self.jax}"] if self.jax and self.implemented else ())]
        for module in map(importlib.import_module, names):
            yield from _backends_of(module)


def _backends_of(module: ModuleType) -> Iterator[Backend]:
    for value in vars(module).values():
        if isinstance(value, tuple) and value and all(isinstance(v, Backend) for v in value):
            yield from value


def _signature(function: Callable[..., Any]) -> str:
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()
    ]
    return f"{function.__name__}{inspect.Signature(parameters)}"
