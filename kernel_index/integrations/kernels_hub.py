"""``kernel-index export``: one entry as a repository that the Hugging Face ``kernels`` loader takes.

A loaded kernel needs nothing but PyTorch: it is no part of an installed package, and one process may load two versions
of it.  So the entry's modules and those that they import are copied with relative imports, and their operators are
registered under the build's own name.
"""

import ast
import functools
import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import kernel_index
from kernel_index.core.terminal import clear_errors
from kernel_index.index.entries import find
from kernel_index.index.entry import ROOT, Entry

PACKAGE = "kernel_index"
BACKENDS = ("cpu", "cuda", "rocm")
SHARED = {
    "core.dispatch": ("Backend", "Explanation", "Ineligible", "Receipt", "explain", "receipts", "strict"),
    "core.force": ("force",),
}
"""What every build exports beside its entry: module -> names."""


def export(name: str, folder: Path, version: int = 1) -> list[Path]:
    """Lay out an entry of the index below ``folder`` and return the builds, one for each kind of device.

    ``get_local_kernel(folder)`` of the ``kernels`` package loads it.  The code is the same for each device, as Triton
    kernels are compiled when they are called; PyTorch is all that a build needs.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [build.name for build in export("fused_relu_squared", Path(folder))]
    ['torch-cpu', 'torch-cuda', 'torch-rocm']

    Raises:
        ValueError: no entry that is implemented has this name, the version is no positive integer, or the folder holds
            something.
    """
    entry = find(name)
    if entry is None or not entry.implemented:
        raise ValueError(f"name must be that of an implemented entry of the index, got {name!r}")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version must be a positive integer, got {version!r}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder must be empty or new, got {folder}")
    modules = closure(*(f"{PACKAGE}.{module}" for module in SHARED), *entry.modules())
    sources = [p for m in modules.values() for suffix in ("*.cpp", "*.h") for p in sorted(m.parent.glob(suffix))]
    texts = (path.read_text() for path in (*modules.values(), *dict.fromkeys(sources)))
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:8]
    builds = []
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        identity = f"_{entry.name}_{backend}_{digest}"
        for dotted, path in modules.items():
            target = build / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(standing_alone(path.read_text(), dotted, identity))
        for path in dict.fromkeys(sources):  # what the modules compile
            shutil.copyfile(path, build / path.relative_to(ROOT))
        (build / "__init__.py").write_text(_front(entry))
        (build / "metadata.json").write_text(json.dumps(_metadata(entry, backend, identity, version), indent=2) + "\n")
        builds.append(build)
    (folder / "README.md").write_text(_card(entry))
    return builds


def closure(*start: str) -> dict[str, Path]:
    """Modules and those that they import, directly or not, also within functions: dotted name -> file."""
    found: dict[str, Path] = {}
    waiting = list(start)
    while waiting:
        dotted = waiting.pop()
        path = _file_of(dotted)
        if dotted in found or path is None or dotted == PACKAGE:
            continue
        found[dotted] = path
        parents = dotted.split(".")[:-1]
        waiting += [".".join(parents[:n]) for n in range(2, len(parents) + 1)]  # a package's __init__ comes along
        waiting += _imported(path.read_text())
    return dict(sorted(found.items()))


@functools.cache  # modules share most of what they import
def _imported(source: str) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _file_of(dotted: str) -> Path | None:
    path = ROOT.joinpath(*dotted.split(".")[1:])
    module, package = path.with_suffix(".py"), path / "__init__.py"
    return module if module.is_file() else package if package.is_file() else None


def standing_alone(source: str, dotted: str, identity: str) -> str:
    """The source of one module with relative imports, and with its operators in a namespace of the build."""
    text = _with_relative_imports(source, dotted)
    return text.replace(f"{PACKAGE}::", f"{identity}::").replace(f"torch.ops.{PACKAGE}", f"torch.ops.{identity}")


@functools.cache
def _with_relative_imports(source: str, dotted: str) -> str:
    depth = len(dotted.split(".")) - 1
    is_package = _file_of(dotted) == ROOT.joinpath(*dotted.split(".")[1:]) / "__init__.py"
    dots = "." * (depth + is_package)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            rest = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            _replace(lines, node, f"from {node.module} import", f"from {dots}{rest} import")
        elif isinstance(node, ast.Import) and [a.name for a in node.names] == [PACKAGE]:
            name = node.names[0].asname or PACKAGE
            whole = ast.get_source_segment(source, node) or ""
            _replace(lines, node, whole, f'{name} = __import__(__name__.partition(".")[0])')
    return "".join(lines)


def _replace(lines: list[str], node: ast.stmt, old: str, new: str) -> None:
    at = node.lineno - 1
    start, rest = lines[at][: node.col_offset], lines[at][node.col_offset :]
    if not rest.startswith(old):
        raise ValueError(f"source must write this import as {old!r}, got {rest!r}")
    lines[at] = start + new + rest.removeprefix(old)


def _front(entry: Entry) -> str:
    """The build's ``__init__.py``: it exports the entry, and gives ``explain`` and ``force`` the functions' names."""
    defined: dict[str, list[str]] = {}
    for name in (*entry.functions, *_types(entry)):
        defined.setdefault(getattr(kernel_index, name).__module__.removeprefix(f"{PACKAGE}."), []).append(name)
    exported = defined | {module: list(names) for module, names in SHARED.items()}
    names = sorted(name for names in exported.values() for name in names)
    imports = "".join(f"from .{module} import {', '.join(found)}\n" for module, found in sorted(exported.items()))
    listed = "".join(f'    "{name}",\n' for name in names)
    functions = ", ".join(f'"{name}": {name}' for name in entry.functions)
    return (
        f'"""{entry.purpose}\n\nOne entry of Kernel Index {kernel_index.__version__}.\n"""\n\n'
        f"from .core.force import PUBLIC\n{imports}\n"
        f'__version__ = "{kernel_index.__version__}"\n\n__all__ = [\n{listed}]\n\nPUBLIC.update({{{functions}}})\n'
    )


def _types(entry: Entry) -> list[str]:
    """Public classes that the functions take or return: a caller has to make or name them."""
    known = {name: value for module in entry.modules() for name, value in vars(importlib.import_module(module)).items()}
    shared = [name for names in SHARED.values() for name in names]
    found = (n for n in kernel_index.__all__ if isinstance(known.get(n), type))
    return [n for n in found if n not in shared and n not in entry.functions]


def _metadata(entry: Entry, backend: str, identity: str, version: int) -> dict[str, Any]:
    return {
        "id": identity,
        "name": entry.name.replace("_", "-"),
        "version": version,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def _card(entry: Entry) -> str:
    calls = "".join(f"- `{signature}`\n" for signature in entry.signatures().values())
    return (
        "---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n\n"
        f"# {entry.name.replace('_', '-')}\n\n{entry.purpose}\n\n{calls}\n"
        f"Made by `kernel-index export {entry.name}` of Kernel Index {kernel_index.__version__}.\n"
    )


def export_command(
    name: Annotated[str, typer.Argument(metavar="ENTRY", help="An entry, or one of its public functions.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    version: Annotated[int, typer.Option("--kernel-version", min=1, help="The version that the hub lists.")] = 1,
) -> None:
    """Lay out one entry as a repository for the Hugging Face kernels loader."""
    with clear_errors():
        builds = export(name, folder, version)
    for build in builds:
        typer.echo(build)
