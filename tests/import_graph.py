"""Which module imports which, read from the source: for ``test_imports.py``.

A name in a string is no import.  The package's front, the index and the command line name modules of higher floors in
strings, and import them when a caller asks for them.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import kernel_index

ROOT = Path(kernel_index.__file__).parent
PACKAGE = "kernel_index"


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_dotted(path): path for path in sorted(ROOT.rglob("*.py"))}
"""Every module and package of ours, dotted -> file."""


@dataclass(frozen=True)
class Import:
    """One imported name; ``module`` is the module of ours that holds it, or the top-level package of another's."""

    name: str
    top: bool  # imported together with the module, not within a function

    @property
    def module(self) -> str:
        name = self.name
        if name.partition(".")[0] != PACKAGE:
            return name.partition(".")[0]
        while name not in MODULES:
            name = name.rpartition(".")[0]
        return name


def imports(source: str) -> Iterator[Import]:
    """Every import of a source, those within functions too; what only a type checker reads is left out."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                yield from (Import(f"{child.module}.{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from (found for branch in child.orelse for found in walk(branch, top))
            else:
                yield from walk(
                    child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                )

    yield from walk(ast.parse(source), True)


def graph() -> dict[str, set[str]]:
    """Module of ours -> the modules of ours that it imports, at whatever time."""
    return {
        name: {i.module for i in imports(path.read_text()) if i.module in MODULES} - {name}
        for name, path in MODULES.items()
    }


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others: Tarjan's strongly connected components."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        waiting.append(name)
        for other in sorted(edges.get(name, ())):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in waiting:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            group = waiting[waiting.index(name) :]
            del waiting[waiting.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(edges):
        if name not in order:
            visit(name)
    return sorted(found)


WRITING = ("clear", "pop", "popitem", "setdefault", "update")


def environment_writes(source: str) -> list[int]:
    """The lines that change the process's environment."""
    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt | ast.expr))
    return [node.lineno for node in nodes if _changes_environment(node)]


def _changes_environment(node: ast.stmt | ast.expr) -> bool:
    if isinstance(node, ast.Subscript):
        return not isinstance(node.ctx, ast.Load) and _is_environment(node.value)
    if isinstance(node, ast.AugAssign):
        return _is_environment(node.target)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        method, of = node.func.attr, node.func.value
        return method in ("putenv", "unsetenv") or (method in WRITING and _is_environment(of))
    return False


def _is_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in ("os.environ", "environ")
