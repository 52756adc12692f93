"""The record of a proof: counts and a machine.  The documentation takes its states from these files.

``kernel-index prove numerics --record FILE`` and ``prove aot --record FILE`` write one; those in ``benchmarks/results``
are committed.
"""

import json
import platform
import re
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kernel_index
from kernel_index.core.atomic_write import write_whole
from kernel_index.core.target import has_package
from kernel_index.core.triton import launch

if TYPE_CHECKING:
    from kernel_index.proofs.aot import Compiled
    from kernel_index.proofs.numerics import Verdict

Counts = dict[str, dict[str, dict[str, dict[str, int]]]]
"""Op -> backend -> ``run``, ``interpreted``, or a target that it was compiled for -> outcome -> calls or kernels."""


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What something was seen on."""
    if device != "cpu":
        return {"device": torch.cuda.get_device_name(), **_versions()}
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", info)
    return {
        "processor": model.group(1) if model else platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **_versions(),
    }


def _versions() -> dict[str, str]:
    found = {"kernel-index": kernel_index.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if has_package("triton"):
        found["triton"] = metadata.version("triton")
    return found | {"date": time.strftime("%Y-%m-%d")}


def of_numerics(verdicts: "Iterable[Verdict]", device: str) -> Counts:
    """A Triton kernel on CPU tensors is interpreted; anything else that gave a verdict has run."""
    counts: Counts = {}
    for v in verdicts:
        state = "interpreted" if v.backend == "triton" and device == "cpu" and launch.interpreting() else "run"
        row = counts.setdefault(v.op, {}).setdefault(v.backend, {})
        row = row.setdefault(state, dict.fromkeys(("passed", "refused", "failed"), 0))
        row["refused" if v.refused else "passed" if v.passes else "failed"] += 1
    return counts


def of_aot(found: "Iterable[Compiled]") -> Counts:
    counts: Counts = {}
    for c in found:
        row = counts.setdefault(c.op, {}).setdefault("triton", {})
        row = row.setdefault(c.target, dict.fromkeys(("compiled", "failed"), 0))
        row["failed" if c.error else "compiled"] += 1
    return counts


def earlier(path: Path) -> dict[str, Any] | None:
    """The record that is there; ``ValueError`` for a file that is none, which is not overwritten."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        if not isinstance(found["counts"], dict):
            raise TypeError("counts is no object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"record must be a new file or one that prove --record wrote, got {path}: {error}") from error
    return found


def write(path: Path, proof: str, counts: Counts, device: str = "cpu") -> None:
    """Write a record; what a file of the same proof, machine, versions and day has of other functions is kept."""
    content: dict[str, Any] = {"proof": proof, "machine": machine(device), "counts": counts}
    before = earlier(path)
    if before is not None and (before.get("proof"), before.get("machine")) == (proof, content["machine"]):
        content["counts"] = dict(sorted((before["counts"] | counts).items()))
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
