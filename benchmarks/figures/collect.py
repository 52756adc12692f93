"""Prove, then measure: the body of ``make bench``."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures.peers import absent
from benchmarks.figures.saved import Figures
from benchmarks.figures.verify import ops_of, verify
from benchmarks.harness import Comparison, console
from kernel_index.proofs.record import machine

HELPERS = ("__init__", "__main__", "command", "harness", "memory")
ALL = sorted(p.stem for p in Path(__file__).parent.parent.glob("*.py") if p.stem not in HELPERS)
NAMES = tuple(name for name in ALL if not name.startswith("gpu"))  # those are run by themselves, where there is one


def collect(names: Sequence[str], rounds: int, check: bool = True) -> tuple[Figures, list[str]]:
    """The figures of these questions, and a line for each question that was refused because a kernel of it is wrong."""
    console.print(", ".join(f"{k} {v}" for k, v in machine().items()), highlight=False)
    comparisons: list[Comparison] = []
    proofs: dict[str, tuple[dict[str, dict[str, int]], list[str]]] = {}
    refused: list[str] = []
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        console.print(f"\n[bold]{(module.__doc__ or name).strip().splitlines()[0]}[/]")
        ops = ops_of(module) if check else ()
        for op in ops:
            if op not in proofs:
                proofs[op] = verify(op)
        failed = [line for op in ops for line in proofs[op][1]]
        if failed:
            refused += [f"{name} is not reported: {line}" for line in failed]
        else:
            comparisons += module.main(rounds=rounds)
    return Figures(comparisons, machine(), {op: counts for op, (counts, _) in proofs.items()}, absent()), refused
