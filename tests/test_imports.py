"""What may import what, and what importing costs: read from the source, and tried in fresh processes.

The package is built in floors.  A module imports its own package and lower floors; packages on one floor do not import
each other.  The lowest comes first:

- ``core``: dispatch, rules, operators, what Triton and C++ kernels share.
- ``masks`` and ``kvcache``: neither needs the other.
- ``routing``: what selects blocks and tokens.
- ``kernels``: the families.  A kernel imports another kernel's ``api`` and nothing else of it; its cases may
  share what is in another kernel's cases.
- the front, ``kernel_index`` itself: the public names.
- ``index``: which entries there are, and what this tree says about each.
- ``nn``, ``integrations`` and ``jax``: layers and adapters.  ``jax`` shares masks and contracts with the kernels; the
  other two call kernels by their public names.
- ``lm`` and ``proofs``: a model with its training, and what proves the kernels.
- ``cli``: the command line.  It names the commands of other floors in strings and imports them when they are called.

Within these floors no module imports itself through others, not even from within a function.
"""

import ast
import inspect
import json
import subprocess
import sys

import pytest

import kernel_index
from kernel_index.core.target import machine_rules
from kernel_index.index.entries import ENTRIES
from tests.import_graph import MODULES, PACKAGE, ROOT, circles, environment_writes, graph, imports

FLOORS = (
    ("core",),
    ("masks", "kvcache"),
    ("routing",),
    ("kernels",),
    ("",),
    ("index",),
    ("nn", "integrations", "jax"),
    ("lm", "proofs"),
    ("cli",),
    ("__main__",),
)
"""Packages by floor, the lowest first; the empty name is the front."""

FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def package_of(module: str) -> str:
    """``kernels`` for ``kernel_index.kernels.loss``; empty for the front."""
    return module.split(".")[1] if "." in module else ""


def upward(module: str, source: str) -> list[str]:
    """What the module of this name imports and may not: modules of a higher floor or of another package on its own."""
    own, found = package_of(module), []
    for name in sorted({i.module for i in imports(source)} & set(MODULES)):
        other = package_of(name)
        if FLOOR[other] > FLOOR[own]:
            found.append(f"{name} is on a higher floor")
        elif FLOOR[other] == FLOOR[own] and other != own:
            found.append(f"{name} is another package of the same floor")
    return found


def test_every_package_has_a_floor():
    assert {package_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module):
    assert upward(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("core.dispatch", "import kernel_index", "kernel_index is on a higher floor"),
        ("core.dispatch", "from kernel_index.masks.doc_window_mask import mask", "on a higher floor"),
        ("core.dispatch", "def f():\n    from kernel_index.kvcache.cache import KVCache", "on a higher floor"),
        ("masks.doc_window_mask.api", "from kernel_index.kvcache import cache", "same floor"),
        ("kvcache.cache", "from kernel_index.masks.doc_window_mask.mask import MaskContract", "same floor"),
        ("routing.topk_keys", "import kernel_index.kernels.sparse.row_gather.api", "on a higher floor"),
        ("routing.topk_keys", "from kernel_index.kvcache.slots import slots_of", None),
        ("kernels.loss", "from kernel_index import MaskContract", "kernel_index is on a higher floor"),
        ("kernels.loss", "from kernel_index import nn", "kernel_index.nn is on a higher floor"),
        ("kernels.loss", "from kernel_index.index.entries import ENTRIES", "on a higher floor"),
        ("nn.attention", "from kernel_index import jax", "same floor"),
        ("nn.attention", "import kernel_index as ki", None),
        ("jax.block_walk", "from kernel_index.kernels.sparse.row_gather.api import gather_rows", None),
        ("lm.train", "from kernel_index.proofs.record import machine", "same floor"),
        ("proofs.commands", "from kernel_index.cli.main import main", "on a higher floor"),
        ("cli.commands", "from kernel_index.lm import train", None),
        ("core.dispatch", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kernel_index", None),
    ],
)
def test_the_floors_can_be_broken(module, line, expected):
    found = upward(f"{PACKAGE}.{module}", line)
    assert bool(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_no_module_imports_itself_through_others():
    assert circles(graph()) == []


def test_a_circle_is_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f", "d"}, "f": {"e"}}
    assert circles(edges) == [["a", "b", "c"], ["e", "f"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", ["nn", "lm", "integrations"])
def test_layers_call_kernels_by_their_public_names(package):
    """Of what is below the front they import the core alone."""
    for module, imported in graph().items():
        if package_of(module) == package:
            below = {name for name in map(package_of, imported) if FLOOR[name] < FLOOR[""]}
            assert below <= {"core"}, module


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) not in ("cli", "proofs")])
def test_a_library_does_not_change_the_environment(module):
    assert environment_writes(MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("os.environ['A'] = 'b'", True),
        ("del os.environ['A']", True),
        ("os.environ |= {}", True),
        ("os.environ.setdefault('A', 'b')", True),
        ("environ.pop('A')", True),
        ("os.putenv('A', 'b')", True),
        ("os.environ.get('A')", False),
        ("variables = os.environ | {'A': 'b'}", False),
        ("variables['A'] = os.environ['A']", False),
    ],
)
def test_a_change_of_the_environment_is_found(line, writes):
    assert bool(environment_writes(f"import os\n{line}")) == writes


# Inside a kernel's folder

FOLDERS = {module.removesuffix(".api") for module in MODULES if module.endswith(".api")}
"""The kernels, dotted; those of ``masks`` and ``routing`` among them."""

BACKENDS = {name for e in ENTRIES for name in e.backends()} | set(machine_rules())
FRAMEWORK = {"triton": ("triton",), "fa4": ("flash_attn", "cutlass"), "pallas": ("jax",)}
"""Module of a backend -> what it may import; flash-attn-4 takes predicates in the language of cutlass."""


def breaches(folder: str, role: str, source: str) -> list[str]:
    """What the module ``role`` of a kernel's folder (dotted) imports and may not."""
    found = []
    framework = FRAMEWORK.get(role.partition("_")[0], ())  # triton_backward.py is triton's too
    plans = package_of(folder) == "masks"  # on the host, with one thread: core/transfers.py
    for i in imports(source):
        other, _, target = i.module.rpartition(".")
        if i.module not in MODULES:
            if i.module not in ("torch", *framework, *sys.stdlib_module_names) and not (plans and i.module == "numpy"):
                found.append(f"needs {i.module}")
        elif other in FOLDERS:
            found += _breaches_of_kernels(folder, role, other, target, i.top)
    return found


def _breaches_of_kernels(folder: str, role: str, other: str, target: str, top: bool) -> list[str]:
    is_kernel = package_of(other) == "kernels"
    if target == "cases":
        return [] if role == "cases" else [f"cases are for tests: {other}.cases"]
    if target == "api" and other == folder and role != "cases":
        return [f"api.py is the top of its folder, and {role} imports it"]
    if target in BACKENDS and role in BACKENDS:
        return [f"backends never import each other: {other}.{target}"]
    if target in BACKENDS and other == folder and role not in ("api", "cases") and not role.startswith("torch_op"):
        return [f"only api.py and torch_op.py import a backend: {other}.{target}"]
    if target in FRAMEWORK and top:
        return [f"imported at the call, not with the module: {other}.{target}"]
    if target != "api" and other != folder and is_kernel:
        return [f"of another kernel only its api is imported: {other}.{target}"]
    return []


@pytest.mark.parametrize("module", [m for m in MODULES if m.rpartition(".")[0] in FOLDERS])
def test_directions_inside_a_kernel(module):
    folder, _, role = module.rpartition(".")
    assert breaches(folder, role, MODULES[module].read_text()) == []


RELU = "kernel_index.kernels.experts.fused_relu_squared"
GATHER = "kernel_index.kernels.sparse.row_gather"


@pytest.mark.parametrize(
    ("role", "line", "expected"),
    [
        ("inductor", f"from {RELU}.reference import relu_squared_reference", "backends never import each other"),
        ("triton", f"def f():\n    from {RELU} import inductor", "backends never import each other"),
        ("contract", f"from {RELU}.inductor import gradient", "only api.py and torch_op.py import a backend"),
        ("philox", f"import {RELU}.reference", "only api.py and torch_op.py import a backend"),
        ("api", f"from {RELU}.triton import kernel", "imported at the call"),
        ("api", f"from {RELU} import triton", "imported at the call"),
        ("api", f"def f():\n    from {RELU}.triton import kernel", None),
        ("torch_op", f"from {RELU}.triton import kernel", "imported at the call"),
        ("torch_op", f"def f():\n    from {RELU} import triton", None),
        ("torch_op", f"from {RELU} import inductor", None),
        ("reference", f"from {RELU}.api import fused_relu_squared", "api.py is the top of its folder"),
        ("reference", f"from {GATHER}.api import gather_rows", None),
        ("reference", f"from {GATHER}.contract import check", "of another kernel only its api is imported"),
        ("torch_op", f"def f():\n    from {GATHER} import torch_op", "of another kernel only its api is imported"),
        ("contract", f"from {RELU}.cases import CASES", "cases are for tests"),
        ("cases", f"from {GATHER}.cases import CASES", None),
        ("cases", f"from {GATHER}.reference import gather_rows_reference", "of another kernel only its api"),
        ("inductor", "import numpy as np", "needs numpy"),
        ("inductor", "import triton", "needs triton"),
        ("triton", "import triton.language as tl", None),
        ("triton_backward", "import triton.language as tl", None),
        ("pallas", "import jax", None),
        ("contract", "import math\nimport torch\nfrom kernel_index.core import checks, inductor", None),
    ],
)
def test_the_directions_can_be_broken(role, line, expected):
    found = breaches(RELU, role, line)
    assert bool(found) == (expected is not None)
    assert expected is None or expected in found[0]


# Names


def test_a_modules_path_leads_to_the_module():
    """A public function of a package's name would hide the package."""
    code = "import kernel_index.kernels.attention.dense_attention.contract as c; print(c.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kernel_index.kernels.attention.dense_attention.contract"


@pytest.mark.parametrize("package", [m for m in MODULES if MODULES[m].name == "__init__.py"])
def test_no_name_of_a_package_hides_a_module_of_it(package):
    children = {m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == package}
    assert children & names_listed(package) == set()


def names_listed(package: str) -> set[str]:
    """``__all__``, read from the source."""
    for node in ast.parse(MODULES[package].read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


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
    later = [name for floor in FLOORS[FLOOR[""] + 1 :] for name in floor]
    assert not {package_of(m) for m in loaded if m.startswith("kernel_index.")} & set(later)
    assert "kernel_index.core.testing" not in loaded
    of_kernels = {m.rpartition(".")[2] for m in loaded if m in MODULES and package_of(m) != "core"}
    assert not of_kernels & {"cases", "triton", "fa4", "pallas"}


def test_importing_the_index_imports_no_further_kernel():
    code = (
        "import sys, kernel_index; before = set(sys.modules); import kernel_index.index.entries;"
        "print([m for m in set(sys.modules) - before if m.startswith('kernel_index') and '.index' not in m])"
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


def test_completion_offers_the_lazy_names_without_importing_them():
    code = (
        "import sys, kernel_index as ki;"
        "print({'jax', 'nn', 'transformers'} <= set(dir(ki)), 'kernel_index.nn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
