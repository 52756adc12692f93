"""``kernel-index list | show | doctor``, and the names of the commands that other folders define."""

import difflib
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import typer.core
from rich.text import Text

import kernel_index
from kernel_index.core import native
from kernel_index.core.target import NO_VECTORS, has_cxx_compiler, machine_rules
from kernel_index.core.terminal import WRONG_USE, Json, console, errors, hanging, print_json
from kernel_index.index.entries import ENTRIES, FAMILIES, find
from kernel_index.index.entry import BackendState, Entry

ELSEWHERE = {
    "train": "kernel_index.lm.commands:train",
    "generate": "kernel_index.lm.commands:generate_command",
    "presets": "kernel_index.lm.commands:presets_command",
    "rollout-check": "kernel_index.lm.rollout_command:rollout_check_command",
    "prove": "kernel_index.proofs.commands:app",
    "tune": "kernel_index.proofs.tune.command:tune",
    "export": "kernel_index.integrations.kernels_hub:export_command",
}
"""Commands defined beside what they run: name -> ``module:function`` or a group, imported when it is called."""

VARIABLES = (
    "KERNEL_INDEX_",
    "TORCHINDUCTOR_",
    "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE",
    "TRITON_INTERPRET",
    "CXX",
)
PACKAGES = ("triton", "flash-attn-4", "nvidia-cutlass-dsl", "jax", "jaxlib", "libtpu", "transformers")


class _Commands(typer.core.TyperGroup):
    """A group that imports a command of ``ELSEWHERE`` only when it is asked for."""

    def list_commands(self, ctx):
        return [*super().list_commands(ctx), *ELSEWHERE]

    def get_command(self, ctx, cmd_name):
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, name = ELSEWHERE[cmd_name].split(":")
        found = getattr(importlib.import_module(module), name)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        single = typer.Typer(add_completion=False)
        single.command(cmd_name)(found)
        return typer.main.get_command(single)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"kernel-index {kernel_index.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit.", show_default=False
        ),
    ] = False,
) -> None:
    """Kernels for language models: what each promises, what this machine can run, and a model that uses them."""


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "seed": entry.seed,
        "family": entry.family,
        "folder": f"kernel_index/{entry.folder}",
        "functions": list(entry.functions),
        "purpose": entry.purpose,
        "implemented": entry.implemented,
        "backends": [
            {
                "functions": list(names),
                "backends": [
                    {"name": b.name, "available": b.machine is None, "reason": b.machine or ""} for b in table
                ],
            }
            for names, table in entry.tables().items()
        ],
        "used_by": [{"name": name, "present": present} for name, present in entry.users().items()],
    }


@app.command("list")
def list_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Only these entries or public functions.", show_default="all"),
    ] = None,
    as_json: Json = False,
) -> None:
    """The entries by family: the functions of each, and its backends on this machine."""
    chosen = [_found(name) for name in names or ()] or ENTRIES
    if as_json:
        print_json([_as_json(e) for e in chosen])
        return
    notes: dict[str, str] = {}
    first = max(len(f"  ki.{name}") for e in ENTRIES for name in e.functions)
    for family in FAMILIES:
        rows = [row for e in chosen if e.family == family for row in _rows(e, notes)]
        if rows:
            console.print(f"\n{family}", style="bold")
        for name, backends in rows:
            _list_row(name, backends, first)
    if not names:
        seed, others = ([e for e in ENTRIES if e.seed is kind] for kind in (True, False))
        console.print(f"\n{sum(e.implemented for e in seed)} of {len(seed)} entries implemented.")
        hanging(console, "", "`kernel-index show NAME` prints the contract and rules of an entry or a function.")
        hanging(console, "", f"Beside these: {', '.join(e.name for e in others)}.")
    if notes:
        console.print("\nNot on this machine:")
    for name, reason in notes.items():
        hanging(console, f"✗ {name}: ", reason)


def _list_row(name: str, backends: str, first: int) -> None:
    """Names and their backends side by side, or below each other where a line is too short for both."""
    if console.width < first + 40:
        for line in name.splitlines():
            console.print(line, soft_wrap=True)
        if backends:
            hanging(console, "      ", backends)
        return
    *above, last = name.splitlines()
    for line in above:
        console.print(line, soft_wrap=True)
    hanging(console, f"{last:<{first}}  ", backends)


def _found(name: str) -> Entry:
    """The entry of a name, or wrong use."""
    entry = find(name)
    if entry is None:
        errors.print(_no_entry(name), soft_wrap=True)
        raise typer.Exit(WRONG_USE)
    return entry


def _rows(e: Entry, notes: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A row for the entry, and one for the functions of each table where they are called otherwise."""
    if not e.implemented:
        yield f"– {e.name}", "not implemented"
        return
    tables = dict(e.tables())
    plain = tuple(name for name in e.functions if not any(name in names for names in tables))
    yield f"✓ {e.name}", _backend_line(tables.pop((e.name,), ()), notes)
    for names, table in tables.items():
        yield "\n".join(f"  ki.{name}" for name in names), _backend_line(table, notes)
    if plain and plain != (e.name,):
        yield "\n".join(f"  ki.{name}" for name in plain), "no backend"


def _called(names: tuple[str, ...]) -> str:
    return ", ".join(f"ki.{name}" for name in names)


def _backend_line(table: tuple[BackendState, ...], notes: dict[str, str]) -> str:
    notes.update({b.name: b.machine for b in table if b.machine})
    return "  ".join(f"{b.name}\N{NO-BREAK SPACE}{'✗' if b.machine else '✓'}" for b in table)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An entry, or a public function.")],
    as_json: Json = False,
) -> None:
    """One entry: its contract, the rules of each backend, and where it is used."""
    e = _found(name)
    if as_json:
        rules = {
            name: {b.name: {"declines": list(b.rules), "auto_declines": list(b.advice)} for b in table}
            for names, table in e.tables().items()
            for name in names
        }
        print_json(_as_json(e) | {"signatures": e.signatures(), "contract": e.docstrings(), "rules": rules})
        return
    console.print(Text.assemble((e.name, "bold"), f"  ({e.family}, kernel_index/{e.folder})"))
    hanging(console, "", e.purpose)
    if not e.implemented:
        hanging(console, "\nNot implemented yet: ", ", ".join(e.missing()))
    for function, text in e.docstrings().items():
        console.print()
        hanging(console, "", f"ki.{e.signatures()[function]}", "bold")
        for line in text.splitlines():
            indent = len(line) - len(line.lstrip())
            hanging(console, " " * indent, line[indent:])
    for names, table in e.tables().items():
        _show_backends(names, table)
    console.print("\nWhere it is used", style="bold")
    for user, present in e.users().items():
        console.print(f"  kernel_index.{user}{'' if present else ' (not yet)'}", soft_wrap=True)


def _show_backends(names: tuple[str, ...], table: tuple[BackendState, ...]) -> None:
    console.print()
    hanging(console, "", f'Backends of {_called(names)}, in the order in which backend="auto" tries them', "bold")
    for b in table:
        hanging(console, f"  {b.name}: ", "available here" if b.machine is None else b.machine)
        for rule in b.rules:
            hanging(console, "    declines: ", rule)
        for rule in b.advice:
            hanging(console, "    auto passes over it: ", rule)


def _no_entry(name: str) -> str:
    known = [n for e in ENTRIES for n in (e.name, *e.functions)]
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`kernel-index list` names them all"
    return f"error: no entry is called {name!r}: {hint}"


@app.command("build")
def build_command() -> None:
    """Compile the C++ kernels for this machine, once, so that no call waits for a compiler."""
    if rule := native.machine_why_not():
        console.print(f"Nothing to build: {rule}.", soft_wrap=True)
        raise typer.Exit(0 if rule == NO_VECTORS else 1)  # a machine that lacks a compiler may get one
    try:
        built = native.build_all()
    except native.build.CannotBuild as error:
        sys.exit(f"error: {error}")
    seconds = sum(b.seconds for b in built)
    made = sum(b.seconds > 0 for b in built)
    console.print(
        f"{made} kernels compiled in {seconds:.0f} s of compiler time, {len(built) - made} were there: "
        f"{built[0].library.parent}",
        soft_wrap=True,
    )


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """What this machine can run, and why it cannot run the rest."""
    facts, rules = _facts(), machine_rules()
    if as_json:
        backends = [{"name": n, "available": r is None, "reason": r or ""} for n, r in rules.items()]
        print_json({"facts": facts, "backends": backends})
        return
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        mark = ":" if name == "not read" else ""
        lines = (
            [f"{k}{mark} {v or 'not installed'}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
        )
        for number, line in enumerate(lines or ["none"]):
            hanging(console, f"{'' if number else name:<{width}} ", line)
    console.print("\nBackends", style="bold")
    for name, reason in rules.items():
        mark = "✗" if reason else "✓"
        hanging(console, f"  {mark} {name}{': ' if reason else ''}", reason or "")


def _facts() -> dict[str, Any]:
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "")
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    return {
        "kernel-index": kernel_index.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "C++ compiler": compiler if has_cxx_compiler() else "not found",
        "CUDA": torch.version.cuda or "PyTorch is built without it",
        "ROCm": torch.version.hip or "PyTorch is built without it",
        "devices": _devices(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cache": f"{folder} ({'in use' if _holds_something(folder) else 'empty'})" if folder.name else "PyTorch's own",
        "variables": {n: v for n, v in sorted(os.environ.items()) if v and n.startswith(VARIABLES)},
        "not read": _unread_variables(),
    }


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _unread_variables() -> dict[str, str]:
    """Variables with our prefix that nothing reads, each with the nearest one that is read."""
    ops = sorted({name for e in ENTRIES for names in e.tables() for name in names})
    known = [
        f"KERNEL_INDEX_{name}" for name in ("STRICT", "NUMERICS", "BACKEND", *(f"BACKEND_{op.upper()}" for op in ops))
    ]
    found = {}
    for name in sorted(os.environ):
        if name.startswith("KERNEL_INDEX_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            found[name] = f"did you mean {near[0]}?" if near else "there is no such variable"
    return found


def _devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return {f"cuda:{i}": f"{p.name}, {p.major}.{p.minor}, {p.total_memory >> 30} GiB" for i, p in enumerate(properties)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
