"""What Triton's compiler gets wrong and its interpreter does not show, held as rules of the source."""

import ast
from pathlib import Path

import pytest

import kernel_index as ki

SOURCES = sorted(Path(ki.__file__).parent.rglob("triton*.py"))


def _names(target: ast.expr) -> list[str]:
    return [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]


def _shared(statement: ast.Assign) -> set[str]:
    """Names that a statement binds to the value of one and the same other name."""
    (target, *others), value = statement.targets, statement.value
    if others:
        return {name for t in statement.targets for name in _names(t)}
    if not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
        return set()
    given = [v.id if isinstance(v, ast.Name) else None for v in value.elts]
    pairs = zip(target.elts, given, strict=True)
    return {t.id for t, v in pairs if isinstance(t, ast.Name) and v is not None and given.count(v) > 1}


def lost(function: ast.FunctionDef) -> set[str]:
    """Names that begin as one value and are carried through a loop as several."""
    found: set[str] = set()
    shared = [(s.lineno, _shared(s)) for s in ast.walk(function) if isinstance(s, ast.Assign)]
    for loop in ast.walk(function):
        if isinstance(loop, ast.For | ast.While):
            assigned = {n for s in ast.walk(loop) if isinstance(s, ast.Assign) for t in s.targets for n in _names(t)}
            for line, names in shared:
                if line < loop.lineno and len(names & assigned) > 1:
                    found |= names & assigned
    return found


def test_the_rule_finds_what_was_lost():
    """``g2`` was the constant 0 in the compiled kernel, with Triton 3.6 and 3.7, and right in the interpreter."""
    source = "def f():\n  g1, g2 = zero, zero\n  for i in range(9):\n    g1, g2 = load(i), g1\n"
    assert lost(ast.parse(source).body[0]) == {"g1", "g2"}
    assert not lost(ast.parse(source.replace("zero, zero", "zeros(4), zeros(4)")).body[0])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_values_that_a_loop_carries_begin_as_tensors_of_their_own(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert not {name for function in functions for name in lost(function)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_sizes_are_cast_by_a_function(path):
    """A size of 1 is a constant of Triton's compiler, a plain int, which has no method ``to``."""
    calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    methods = [c.func for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "to"]
    assert [m.value.id for m in methods if isinstance(m.value, ast.Name) and m.value.id.isupper()] == []


OURS = {"jit", "HopperKernel", "QuickHopperKernel", "_Kernel"}
"""Decorators whose launches start nothing while ``torch.compile`` traces: ``core/ahead.py``."""


def started(tree: ast.Module) -> set[str]:
    """Kernels of a module, by their names or because it launches them, that have another decorator."""
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    calls = [n.func.value for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    launched = {c.id for c in calls if isinstance(c, ast.Name)}
    kernels = [f for f in functions if f.name in launched or f.name.endswith("_kernel")]
    return {f.name for f in kernels if not OURS & {n for d in f.decorator_list for n in _names(d)}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}:{path.stem}")
def test_a_launch_can_be_learned_from(path):
    assert started(ast.parse(path.read_text())) == set()


def test_a_launch_that_cannot_is_found():
    """It was started on tensors without memory, where a graph was only traced."""
    source = "@gluon.jit\ndef _kernel(x):\n    pass\ndef run(x):\n    _kernel[(1,)](x)\n"
    assert started(ast.parse(source)) == {"_kernel"}
    assert started(ast.parse(source.replace("@gluon.jit", "@functools.partial(HopperKernel, noinline=True)"))) == set()
