"""Size budgets and habits that no linter checks: ``python -m tests.budgets`` prints what breaks one.

Needs neither PyTorch nor the package.  No file is excluded; a budget that hurts is a design question.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernel_index", "tests", "benchmarks", "docs", "tools")
FUNCTION_LINES, KERNEL_LINES, FILE_LINES, PARAMETERS = 60, 150, 400, 12
UNCOUNTED = ("self", "cls", "ctx", "backend")  # every function with backends has the last
BROAD = ("Exception", "BaseException")
RERAISES = (
    "kernel_index/core/dispatch.py",
    "run",
)  # the one place that may catch everything: it writes a receipt and raises
HOSTS = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.(?:org|com)|npmjs\.(?:org|com)|proxy\.golang\.org"
    r"|artifact[o]ry|[\w.-]+/simple/|--(?:extra-)?index-url",
    re.IGNORECASE,
)
PATHS = re.compile(
    r"(?<![\w.~$}/<-])/(?:home|root|work|tmp|Users|mnt|opt|usr|var|srv|private|data)/(?!bin/env\b)[\w.-]+"
)
MARKS = re.compile(r"#.*\b(?:TO[D]O|FIX[M]E|XX[X])\b")


def problems(root: Path = ROOT) -> list[str]:
    """One line for every breach below a project folder, as ``path:line: what``."""
    found: list[str] = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            found.extend(f"{name}:{line}: {what}" for line, what in check_python(name, path.read_text()))
    for name in project_files(root):
        found.extend(f"{name}:{line}: {what}" for line, what in check_text(root / name))
    return found


def check_python(name: str, source: str) -> Iterator[tuple[int, str]]:
    lines = source.count("\n") + (not source.endswith("\n") and bool(source))
    if lines > FILE_LINES:
        yield 1, f"{lines} lines, at most {FILE_LINES} in a file"
    if Path(name).name == "utils.py":
        yield 1, "name the file after what it holds, not utils.py"
    tree = ast.parse(source)
    yield from _check_constants(tree)
    for node, owner in _walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _check_function(node)
        elif isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _reraises(node, (name, owner)):
            yield node.lineno, "names no exception: catch what can be expected here"
        elif isinstance(node, ast.Call) and _named(node.func) == "suppress" and any(map(_is_broad, node.args)):
            yield node.lineno, "suppresses every exception"


def check_text(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text()
    except UnicodeDecodeError:  # an image
        return
    for number, line in enumerate(text.splitlines(), 1):
        if match := HOSTS.search(line):
            yield number, f"names a package registry: {match[0]}"
        if match := PATHS.search(line):
            yield number, f"names a path of one machine: {match[0]}"
        if path.suffix == ".py" and (match := MARKS.search(line)):
            yield number, f"leaves work undone: {match[0]}"


def project_files(root: Path) -> list[str]:
    """What is or would be committed."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (root / name).is_file()]


def _walk(tree: ast.AST, owner: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Every node with the name of the function around it."""
    for node in ast.iter_child_nodes(tree):
        yield node, owner
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else owner
        yield from _walk(node, inside)


def _check_constants(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A function reads the last value of a module's constant, also one that stands above."""
    seen = set()
    for node in tree.body:
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
        names = {_named(t) for target in targets for t in getattr(target, "elts", [target]) if isinstance(t, ast.Name)}
        yield from ((node.lineno, f"{name} has a second value") for name in sorted(names & seen) if name.isupper())
        seen |= names


def _check_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    lines = node.end_lineno - node.lineno + 1 - _docstring_lines(node)
    on_device = any(_named(n) in ("jit", "HopperKernel") for d in node.decorator_list for n in ast.walk(d))
    limit, kind = (KERNEL_LINES, "a device kernel") if on_device else (FUNCTION_LINES, "a function")
    if lines > limit:
        yield node.lineno, f"{node.name} has {lines} lines, at most {limit} in {kind}"
    a = node.args
    count = len([p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in UNCOUNTED])
    if count > PARAMETERS and not on_device and not node.name.startswith("_"):
        yield node.lineno, f"{node.name} has {count} parameters, at most {PARAMETERS} in a public function"


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A budget on code must not make anyone shorten a contract."""
    first = node.body[0]
    return 0 if ast.get_docstring(node) is None else first.end_lineno - first.lineno + 1


def _named(node: ast.AST) -> str:
    """The last part of a dotted name, or of what a call calls, ``partial`` included."""
    if isinstance(node, ast.Call):
        name = _named(node.func)
        return _named(node.args[0]) if name == "partial" and node.args else name
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(map(_is_broad, kind.elts))
    return kind is None or _named(kind) in BROAD


def _reraises(handler: ast.ExceptHandler, place: tuple[str, str]) -> bool:
    last = handler.body[-1]
    return place == RERAISES and isinstance(last, ast.Raise) and last.exc is None


if __name__ == "__main__":
    breaches = problems()
    print("\n".join(breaches) or "every budget is kept")
    sys.exit(bool(breaches))
