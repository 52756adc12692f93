"""``make new``: what it makes passes the checks and the conformance test, in a copy of this tree."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kernel_index.index.entry import ROOT
from tools import scaffold

NAME = "fused_swish"
IGNORED = shutil.ignore_patterns("__pycache__", "runs", "*.pyc")
CHANGED = ("__init__.py", "index/entries.py")
"""The files of the package that a new kernel changes."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy in which every family has one kernel more."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("kernel_index", "tests"):
        shutil.copytree(ROOT.parent / folder, copy / folder, ignore=IGNORED)
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT.parent / name, copy)
    for family in scaffold.families():
        scaffold.new(family, new_name(family), copy / "kernel_index")
    return copy


def new_name(family: str) -> str:
    """One of them as long as a name may be, in the family with the longest name."""
    name = f"{NAME}_{family}"
    return name.ljust(scaffold.LONGEST, "x") if family == max(scaffold.families(), key=len) else name


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    return subprocess.run([sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True)


def made(tree: Path) -> list[str]:
    names = [*tree.glob(f"kernel_index/kernels/*/{NAME}_*"), *(tree / "kernel_index" / name for name in CHANGED)]
    return [str(path.relative_to(tree)) for path in names]


def test_what_it_makes_needs_no_formatter_and_no_linter(tree):
    assert len(made(tree)) == len(scaffold.families()) + 2
    for command in (("check",), ("format", "--check")):
        done = run(tree, "ruff", *command, *made(tree))
        assert done.returncode == 0, done.stdout


def test_what_it_makes_keeps_the_budgets_and_the_types(tree):
    from tests.budgets import check_python

    for path in tree.glob(f"kernel_index/kernels/*/{NAME}_*/*.py"):
        assert list(check_python(path.name, path.read_text())) == []
    files = [str(path) for path in tree.glob(f"kernel_index/kernels/experts/{NAME}_*/*.py")]
    done = run(tree, "pyrefly", "check", "--python-interpreter-path", sys.executable, *files)
    assert done.returncode == 0, done.stdout


@pytest.mark.thorough
def test_what_it_makes_is_in_the_index_and_conforms(tree):
    name = f"{NAME}_experts"
    # The plain formula, and one compiled call: to compile the rest takes a minute, and is the new kernel's to do.
    selected = f"{name} and (reference and not one_graph or inductor-rows-bfloat16) or twenty_entries"
    files = [f"tests/test_{file}.py" for file in ("conformance", "cli", "imports")]
    done = run(tree, "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selected)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20, done.stdout


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("kitchen", "fused_swish", "FAMILY must be one of attention, boundary"),
        ("experts", "FusedSwish", "NAME must be a lower-case Python name"),
        ("experts", "class", "NAME must be a lower-case Python name"),
        ("experts", "a" * 28, "of at most 27 characters"),
        ("experts", "../swish", "NAME must be a lower-case Python name"),
        ("experts", "fused_relu_squared", "NAME must be free"),
        ("loss", "token_log_probs", "NAME must be free"),
        ("loss", "receipts", "NAME must be free"),
    ],
)
def test_a_refusal_writes_nothing(tree, family, name, message):
    before = [(ROOT / changed).read_text() for changed in CHANGED]
    result = CliRunner().invoke(scaffold.app, [family, name])
    assert result.exit_code == 2
    assert message in result.output
    assert [(ROOT / changed).read_text() for changed in CHANGED] == before


def test_an_installed_package_is_not_written(tmp_path):
    package = tmp_path / "kernel_index"
    for name in CHANGED:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, package / name)
    family = package / "kernels" / "experts"
    family.mkdir(parents=True)
    with pytest.raises(ValueError, match="must be run from a checkout"):
        scaffold.new("experts", NAME, package)
    assert list(family.iterdir()) == []


def test_the_names_stay_in_order(tree):
    source = (tree / "kernel_index" / "__init__.py").read_text()
    names = scaffold._exported(source)
    assert names == sorted(names)
    assert {new_name(family) for family in scaffold.families()} <= set(names)
    ast.parse((tree / "kernel_index" / "index" / "entries.py").read_text())
