"""No figure for a kernel that is wrong: a benchmark's ops are proved against float64 before anything is timed."""

import ast
import inspect
from types import ModuleType

from kernel_index.core.testing import suites
from kernel_index.proofs.numerics import Verdict, prove


def ops_of(module: ModuleType) -> tuple[str, ...]:
    """The functions that a benchmark measures: its ``OPS``, or every ``ki.<function with backends>`` in its source."""
    known = {suite.op for suite in suites()}
    if hasattr(module, "OPS"):
        return module.OPS
    tree = ast.parse(inspect.getsource(module))
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    return tuple(dict.fromkeys(n.attr for n in calls if n.value.id == "ki" and n.attr in known))


def verify(op: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Run the op's first case on every backend that runs here: counts by backend, and a line for all that failed."""
    counts: dict[str, dict[str, int]] = {}
    failed = []
    for v in prove(ops=(op,), every=False):
        row = counts.setdefault(v.backend, dict.fromkeys(("passed", "refused", "failed"), 0))
        row["refused" if v.refused else "passed" if v.passes else "failed"] += 1
        if not v.passes:
            failed.append(f"{op}, {v.backend}, case {v.case}, {v.dtype}: {_what(v)}")
    if not any(row["passed"] + row["failed"] for row in counts.values()):
        failed.append(f"{op}: no case of it runs here")
    return counts, failed


def _what(verdict: Verdict) -> str:
    if verdict.raised:
        return verdict.raised
    worst = max((f for f in verdict.findings if not f.passes), key=lambda f: f.error)
    return f"{worst.label} {worst.note or f'has error {worst.error:.3g}, budget {worst.budget:.3g}'}"
