"""What importing costs and who may import whom: read from the source, and tried in fresh processes."""

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernel_index
from kernel_index.core.target import machine_rules

ROOT = Path(kernel_index.__file__).parent
FOLDERS = sorted(p.parent for p in ROOT.rglob("api.py"))
KERNELS = {".".join(("kernel_index", *f.relative_to(ROOT).parts)) for f in FOLDERS}
BACKENDS = set(machine_rules())
FRAMEWORK = {"triton": "triton", "fa4": "flash_attn", "pallas": "jax"}  # module of a backend -> what it may import
ABOVE = {"nn", "lm", "cli", "commands", "index", "proofs", "cases"}  # parts of the package that no kernel may know
CORE = ("dispatch", "target", "checks", "inductor", "index")


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every imported module and name, dotted, and whether it is imported with the module or in a function."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                yield child.module, top
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            yield from walk(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(source), True)


def kernel_module(name: str) -> str | None:
    """``contract`` for ``kernel_index.family.kernel.contract`` and for a name in it; None outside the kernels."""
    parts = name.split(".")
    return parts[3] if ".".join(parts[:3]) in KERNELS and len(parts) > 3 else None


def breaches(role: str, source: str, folder: str) -> list[str]:
    """What the module of this name in a kernel's folder (dotted) may not import, and does.

    A kernel that is made of others calls them through their ``api``; its own is imported by no module below it.
    """
    found = []
    framework = FRAMEWORK.get(role.partition("_")[0])  # triton_backward.py is triton's too
    for name, top in imports(source):
        target = kernel_module(name)
        top_level, *rest = name.split(".")
        if top_level == "kernel_index" and rest and rest[0] in ABOVE and role != "cases":
            found.append(f"a kernel knows nothing of {name}")
        elif name == "kernel_index" and role != "cases":
            if not top:
                found.append("a kernel does not import the whole index")
        elif target in BACKENDS and role in BACKENDS:
            found.append(f"backends never import each other: {name}")
        elif target in BACKENDS and role not in ("api", "cases") and not role.startswith("torch_op"):
            found.append(f"only api.py and torch_op.py import a backend: {name}")
        elif target in FRAMEWORK and top:
            found.append(f"imported at the call, not with the module: {name}")
        elif target == "api" and role not in ("api", "cases") and name.startswith(f"{folder}."):
            found.append(f"api.py is the top of its folder: {name}")
        elif target == "cases" and role != "cases":
            found.append(f"cases are for tests: {name}")
        elif top_level not in ("torch", "kernel_index", framework, *sys.stdlib_module_names):
            found.append(f"needs {name}")
    return found


MODULES = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_directions_inside_a_kernel(path):
    folder = ".".join(("kernel_index", *path.parent.relative_to(ROOT).parts))
    assert breaches(path.stem, path.read_text(), folder) == []


RELU = "kernel_index.kernels.experts.fused_relu_squared"


@pytest.mark.parametrize(
    ("role", "line", "expected"),
    [
        ("inductor", f"from {RELU}.reference import relu_squared_reference", "backends never import each other"),
        ("triton", f"def f():\n    from {RELU} import inductor", "backends never import each other"),
        (
            "contract",
            f"from {RELU}.inductor import relu_squared_inductor",
            "only api.py and torch_op.py import a backend",
        ),
        ("philox", f"import {RELU}.reference", "only api.py and torch_op.py import a backend"),
        ("api", f"from {RELU}.triton import kernel", "imported at the call"),
        ("api", f"from {RELU} import fa4", "imported at the call"),
        ("api", f"def f():\n    from {RELU}.triton import kernel", None),
        ("torch_op", f"from {RELU}.triton import kernel", "imported at the call"),
        ("torch_op", f"def f():\n    from {RELU} import triton", None),
        ("torch_op", f"from {RELU} import inductor", None),
        ("reference", f"from {RELU}.api import fused_relu_squared", "api.py is the top of its folder"),
        ("reference", "from kernel_index.kernels.sparse.row_gather.api import gather_rows", None),
        ("api", f"from {RELU}.api import fused_relu_squared", None),
        ("contract", f"from {RELU}.cases import CASES", "cases are for tests"),
        ("api", "from kernel_index.nn import TransformerBlock", "a kernel knows nothing of kernel_index.nn"),
        ("api", "from kernel_index import lm", "a kernel knows nothing of kernel_index.lm"),
        ("api", "def f():\n    import kernel_index", "does not import the whole index"),
        ("inductor", "import numpy as np", "needs numpy"),
        ("inductor", "import triton", "needs triton"),
        ("triton", "import triton.language as tl", None),
        ("triton_backward", "import triton.language as tl", None),
        ("pallas", "import jax", None),
        ("contract", "import math\nimport torch\nfrom kernel_index import checks, inductor", None),
    ],
)
def test_the_directions_can_be_broken(role, line, expected):
    found = breaches(role, line, RELU)
    assert bool(found) == (expected is not None)
    assert expected is None or expected in found[0]


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_no_kernel(name):
    families = {f.parent.name for f in FOLDERS} | ABOVE - {"index"}
    for imported, _ in imports((ROOT / f"{name}.py").read_text()):
        parts = imported.split(".")
        assert not (parts[0] == "kernel_index" and len(parts) > 1 and parts[1] in families), imported
        assert parts[0] in ("torch", "kernel_index", *sys.stdlib_module_names), imported


@pytest.mark.parametrize("package", ["nn", "lm"])
def test_layers_call_kernels_through_the_public_functions(package):
    for path in (ROOT / package).rglob("*.py"):
        for imported, _ in imports(path.read_text()):
            assert kernel_module(imported) is None, f"{path.name} imports {imported}"


# Fresh processes

REPORT = """
import json, sys
for name in {blocked}:
    sys.modules[name] = None
import torch
before = set(sys.modules)
import kernel_index
added = sorted(set(sys.modules) - before)
import torch as _
print(json.dumps({{"added": added, "loaded": sorted(m for m in sys.modules if sys.modules[m] is not None)}}))
"""


def fresh(blocked: tuple[str, ...] = ()) -> dict[str, list[str]]:
    code = REPORT.format(blocked=blocked)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_import_needs_pytorch_alone():
    """With every optional package blocked; what it adds is its own, the standard library's, or PyTorch's."""
    added = fresh(
        ("triton", "flash_attn", "jax", "transformers", "typer", "rich", "safetensors", "matplotlib", "jinja2")
    )["added"]
    others = {m.split(".")[0] for m in added} - {"kernel_index", "torch"} - set(sys.stdlib_module_names)
    assert others == set()


def test_the_import_stays_light():
    """No compiler, no model and no test data: `python -m benchmarks imports` has the milliseconds."""
    report = fresh()
    loaded = set(report["loaded"])
    assert not loaded & {"torch._dynamo", "torch._inductor", "torch._inductor.config", "torch._functorch.aot_autograd"}
    heavy = {"sympy", "triton", "jax", "flash_attn", "typer", "rich", "matplotlib", "jinja2", "safetensors", "pytest"}
    assert not {m.split(".")[0] for m in report["added"]} & heavy
    packages = (
        "kernel_index.nn",
        "kernel_index.lm",
        "kernel_index.cli",
        "kernel_index.cli.commands",
        "kernel_index.cli.index",
    )
    assert not loaded & {*packages, "kernel_index.core.testing"}
    assert not [
        m for m in loaded if m.startswith("kernel_index.") and m.endswith((".cases", ".triton", ".fa4", ".pallas"))
    ]


def test_importing_the_index_imports_no_further_kernel():
    code = (
        "import sys, kernel_index; before = set(sys.modules); import kernel_index.cli.index;"
        "print([m for m in set(sys.modules) - before if m.startswith('kernel_index') and '.cli' not in m])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# The public names


def test_all_is_sorted_and_complete():
    names = kernel_index.__all__
    assert sorted(names) == names
    assert len(set(names)) == len(names)
    imported = {
        alias.asname or alias.name
        for node in ast.parse((ROOT / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    imported -= {"PUBLIC", "TYPE_CHECKING"}
    assert imported == set(names) | {"__version__"}, "everything that is re-exported is named, and nothing else"


@pytest.mark.parametrize("name", kernel_index.__all__)
def test_a_public_name_is_documented_with_an_example(name):
    value = getattr(kernel_index, name)
    text = inspect.getdoc(value) or ""
    own = value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__
    assert own, f"{name} has no docstring of its own"
    assert ">>>" in text, f"{name} has no example"
    first = text.splitlines()[0]
    assert first.endswith((".", "?")) or "``" in first, f"{name} begins with a sentence"
