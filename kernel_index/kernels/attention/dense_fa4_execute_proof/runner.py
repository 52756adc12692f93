"""Runs the program in a separate process, and writes a receipt whatever happens to it."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kernel_index.core.atomic_write import write_whole
from kernel_index.core.digest import digest
from kernel_index.kernels.attention.dense_fa4_execute_proof.emit import SCHEMA, ProofMode, emit
from kernel_index.kernels.attention.dense_fa4_execute_proof.request import ProofRequest
from kernel_index.kernels.attention.dense_fa4_execute_proof.verify import unmet

TARGETS = {
    "sm_90a": {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"},
    "sm_100a": {"FLASH_ATTENTION_ARCH": "sm_100", "CUTE_DSL_ARCH": "sm_100a", "FLASH_ATTENTION_NUM_SMS": "148"},
}
"""Architectures to compile for without a device; the compiled code depends on the number of multiprocessors."""

TAIL = 4000
PACKAGE_MISSING = "package_missing"


def prove(
    request: ProofRequest,
    *,
    mode: ProofMode,
    device: str = "cuda",
    time_limit: float = 600.0,
    out: Path | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Execute, or compile for every target, and return the receipt.  ``environment`` adds variables for the program."""
    receipt: dict[str, Any] = {
        "schema": SCHEMA,
        "state": "planned",
        "execute_proof_passed": False,
        "refusal": None,
        "request": request.to_json(),
        "program": emit(request, mode, device),
        "time_limit_seconds": time_limit,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": {"platform": platform.platform(), "python": platform.python_version()},
        "runs": [],
    }
    write(receipt, out)  # fails before the work if the path is not writable; a killed prover leaves state "planned"
    targets = {device: {}} if mode == "execute" else TARGETS
    for name, variables in targets.items():
        run = run_program(receipt["program"], time_limit, (environment or {}) | variables)
        receipt["runs"].append({"target": name} | run)
        if "missing" in run["report"]:
            break
    missing = receipt["runs"][-1]["report"].get("missing")
    if missing is not None:
        reason = f"needs the flash-attn-4 package: the program found no module {missing}"
        receipt["refusal"] = {"code": PACKAGE_MISSING, "reason": reason}
    elif all(run["return_code"] == 0 and run["report"].get("finished") is True for run in receipt["runs"]):
        receipt["state"] = "executed" if mode == "execute" else "compiled"
    receipt["execute_proof_passed"] = not unmet(receipt)
    write(receipt, out)
    return receipt


def write(receipt: dict[str, Any], out: Path | None) -> None:
    """Add the digest to the receipt, and write it to ``out`` in one step."""
    receipt["digest"] = digest(receipt)
    if out is not None:
        write_whole(out, json.dumps(receipt, indent=1, allow_nan=False) + "\n")


def run_program(program: str, time_limit: float, variables: dict[str, str]) -> dict[str, Any]:
    """Run the program in one process; the time limit ends it and every process that it started."""
    with tempfile.TemporaryDirectory() as folder:
        script, report, log = (Path(folder) / name for name in ("program.py", "report.json", "log.txt"))
        script.write_text(program)
        start = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(script), str(report)],
                cwd=folder,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            timed_out = False
            try:
                process.wait(time_limit)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _end(process)
        return {
            "return_code": process.returncode,
            "timed_out": timed_out,
            "seconds": round(time.monotonic() - start, 2),
            "log_tail": log.read_bytes()[-TAIL:].decode(errors="replace").replace(folder, "."),
            "report": json.loads(report.read_text()) if report.exists() else {},
        }


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program together with every process that it started."""
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
