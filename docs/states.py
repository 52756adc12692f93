"""What has been seen of each backend, and where: read from ``benchmarks/results``, and from nowhere else."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
KINDS = ("run", "interpreted", "compiled")
"""On the hardware it is for; through an interpreter on a CPU; to machine code without the hardware."""

TPU_CASES = {"attention": "attention", "clustered": "clustered_sparse_attention"}
"""Cases of ``prove tpu`` that are kernels of ours, and the function that each belongs to."""


ON_TOP = {"block_router": ("moba_route", "clustered_route")}
"""Operators that are proved under their own name, and the public functions that hand their call on to them."""


@dataclass(frozen=True)
class State:
    """``passed`` calls were right (or kernels compiled) and ``failed`` were not, ``where`` and with these versions."""

    op: str
    backend: str
    kind: str
    where: str
    versions: str
    passed: int
    failed: int
    source: str

    @property
    def date(self) -> str:
        """The day of the record, which ends its versions; empty in a record without one."""
        found = re.search(r"\d{4}-\d\d-\d\d$", self.versions)
        return found[0] if found else ""

    def __str__(self) -> str:
        """``run``, with what failed; a backend of which nothing passed is not said to run."""
        if not self.failed:
            return self.kind
        return f"{self.kind}: {self.failed} of {self.passed + self.failed} failed" if self.passed else "failed"


def read(folder: Path = RESULTS) -> list[State]:
    """The newest state of each backend and machine, newest first; a call that was only refused says nothing."""
    found = [s for name, content in contents(folder) for s in _of_file(name, content)]
    found += [replace(s, op=op) for s in found for op in ON_TOP.get(s.op, ())]
    newest: dict[tuple[str, ...], State] = {}
    for s in sorted((s for s in found if s.passed or s.failed), key=lambda s: s.date):
        newest[s.op, s.backend, s.kind, s.where] = s
    return sorted(newest.values(), key=lambda s: s.date, reverse=True)


def current(states: Iterable[State]) -> list[State]:
    """Of one backend's states, those of the latest day of each kind: a later run replaces an earlier one."""
    found = list(states)
    days = {kind: max((s.date for s in found if s.kind == kind), default="") for kind in KINDS}
    return [s for s in found if s.date == days[s.kind]]


def contents(folder: Path = RESULTS) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each result file; other files may lie beside them."""
    found = [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [(name, content) for name, content in found if isinstance(content, dict)]


def notes(ops: Iterable[str], folder: Path = RESULTS) -> list[str]:
    """What the result files say about these functions in words."""
    found = [
        note for _, c in contents(folder) for note in (*c.get("notes", ()), *c.get("numerics", {}).get("notes", ()))
    ]
    return [note for note in found if re.split(r"[:,]", note)[0] in ops]


def _of_file(source: str, content: dict[str, Any]) -> Iterator[State]:
    if "lines" in content:  # of benchmarks.gpu
        yield from _of_gpu(source, content)
    elif "counts" in content:  # of prove --record
        machine = content["machine"]
        for op, backends in content["counts"].items():
            for backend, rows in backends.items():
                for place, row in rows.items():
                    kind, where = (place, _where(machine)) if place in KINDS else ("compiled", place)
                    passed = row.get("passed", row.get("compiled", 0))
                    yield State(op, backend, kind, where, _versions(machine), passed, row["failed"], source)
    elif content.get("proof") == "tpu":  # of prove tpu
        for row in content["rows"]:
            if row["case"] in TPU_CASES:
                op, bad = TPU_CASES[row["case"]], int(bool(row["error"]))
                versions = _versions(content["versions"])
                yield State(op, "pallas", "compiled", row["generation"], versions, len(row["kernels"]), bad, source)
    elif "verified" in content:  # of python -m benchmarks --save
        machine = content["machine"]
        for op, backends in content["verified"].items():
            for backend, row in backends.items():
                yield State(
                    op, backend, "run", _where(machine), _versions(machine), row["passed"], row["failed"], source
                )


def _of_gpu(source: str, content: dict[str, Any]) -> Iterator[State]:
    machine = content["environment"]
    place = (_where(machine), _versions(machine))
    for backend, key in (("triton", "numerics"), ("fa4", "numerics_fa4")):
        for op, row in content.get(key, {}).get("counts", {}).items():
            yield State(op, backend, "run", *place, row["passed"], row.get("failed", 0), source)
    proofs = [p for p in content.get("fa4_execute_proofs", ()) if p["state"] == "executed"]
    passed = sum(p["passed"] for p in proofs)
    yield State("fa4_execute_proof", "fa4", "run", *place, passed, len(proofs) - passed, source)


def _where(machine: dict[str, Any]) -> str:
    return str(machine.get("device") or machine.get("processor"))


def _versions(machine: dict[str, Any]) -> str:
    names = (("torch", "PyTorch"), ("triton", "Triton"), ("jax", "JAX"), ("libtpu", "libtpu"), ("date", ""))
    return ", ".join(f"{name} {machine[key]}".strip() for key, name in names if key in machine)
