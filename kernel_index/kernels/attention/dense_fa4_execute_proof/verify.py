"""Whether a receipt is a proof: every condition is checked again from the recorded facts.

A correct digest proves nothing; the conditions below decide.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernel_index.core.digest import digest_problems
from kernel_index.core.fa4_support import support_of
from kernel_index.kernels.attention.dense_fa4_execute_proof.emit import SCHEMA, emit
from kernel_index.kernels.attention.dense_fa4_execute_proof.request import ProofRequest

EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
NEEDED_VERSIONS = ("python", "torch", "cuda", "driver", "flash-attn-4", "nvidia-cutlass-dsl")


def problems(receipt: Any) -> list[str]:
    """Why a receipt is no proof of execution; empty if it is one."""
    if not isinstance(receipt, dict):
        return ["the receipt is not a JSON object"]
    found = digest_problems(receipt)
    if any(problem.startswith("malformed") for problem in found):
        return found
    if receipt.get("execute_proof_passed") is not True:
        found.append("execute_proof_passed is not true")
    return found + unmet(receipt)


def unmet(receipt: dict[str, Any]) -> list[str]:
    """The conditions of a proof that the receipt does not meet."""
    found: list[str] = []
    try:
        for problem in _conditions(receipt):
            found.append(problem)  # one by one, to keep those found before a malformed field
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        found.append(f"malformed: {type(error).__name__}: {error}")
    return found


def _conditions(receipt: dict[str, Any]) -> Iterator[str]:
    if receipt["schema"] != SCHEMA:
        yield "schema is not the one of this version"
    if receipt["state"] != "executed":
        yield f"state is {receipt['state']!r}, not 'executed'"
    if receipt["refusal"] is not None:
        yield "the proof was refused"
    request = ProofRequest.from_json(receipt["request"])
    if receipt["program"] != emit(request, "execute", "cuda"):
        yield "program is not this version's"
    if len(receipt["runs"]) != 1:
        yield f"runs must be one run, got {len(receipt['runs'])}"
    run = receipt["runs"][0]
    if run["return_code"] != 0 or run["return_code"] is False:
        yield "return code is not 0"
    if run["timed_out"] is not False:
        yield "the time limit was reached"
    yield from _report(run["report"])
    yield from _numerics(run["report"]["numerics"], request)


def _report(report: dict[str, Any]) -> Iterator[str]:
    for stage in ("import_success", "forward_success", "backward_success", "finished"):
        if report.get(stage) is not True:
            yield f"{stage} is not true"
    for name in NEEDED_VERSIONS:
        if not _is_text(report["versions"].get(name)):
            yield f"version of {name} is missing"
    device = report["device"]
    if device["type"] != "cuda" or not _is_text(device["name"]):
        yield "device is not a CUDA device"
    capability = device["capability"]
    if not (isinstance(capability, list) and len(capability) == 2 and support_of(10 * capability[0] + capability[1])):
        yield "device capability is none that flash-attn-4 runs on"
    for direction, words in (("forward", ("forward", "fwd")), ("backward", ("backward", "bwd"))):
        if not any("flash" in name.lower() and any(w in name.lower() for w in words) for name in report["kernels"]):
            yield f"the profiler saw no flash-attn-4 {direction} kernel"
    for name in ("median_milliseconds", "peak_memory_bytes"):
        if not (_is_number(report[name]) and report[name] > 0):
            yield f"{name} is not a positive number"


def _numerics(numerics: dict[str, Any], request: ProofRequest) -> Iterator[str]:
    b, t, h, k, d = request.shape
    eps = EPS[request.dtype]
    for label, shape in {"out": [b, t, h, d], "dq": [b, t, h, d], "dk": [b, t, k, d], "dv": [b, t, k, d]}.items():
        row = numerics[label]
        if row["shape"] != shape or row["dtype"] != request.dtype:
            yield f"{label}: shape or dtype is not the promised one"
        if row["nan"] != 0 or row["inf"] != 0 or isinstance(row["nan"], bool) or isinstance(row["inf"], bool):
            yield f"{label}: holds NaN or infinity"
        names = ("max_abs", "reference_max_abs", "max_abs_error", "max_relative_error", "baseline_max_abs_error")
        values = [row[name] for name in (*names, "tolerance")]
        if not all(_is_number(x) and x >= 0 for x in values):
            yield f"{label}: an error is not a finite number"
            continue
        largest, exact, error, _, baseline, tolerance = values
        if largest == 0 or exact == 0:
            yield f"{label}: is zero throughout"
        # 2 · |x + 0.3 − 0.3 − x| is twice two roundings, each at most half a unit of a number up to |x| + 0.3.
        if tolerance > 2 * eps * (exact * (1 + eps) + 0.3):
            yield f"{label}: tolerance is more than rounding explains"
        if baseline > 16 * eps * max(exact, 1.0):
            yield f"{label}: the baseline's own error is implausible"
        if error > 2 * baseline + tolerance:
            yield f"{label}: error is over 2 × the baseline's + tolerance"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def verify_file(path: Path) -> list[str]:
    """``problems`` of a receipt file; a file that cannot be read as JSON is one problem."""
    try:
        receipt = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        return [f"cannot be read as JSON: {error}"]
    return problems(receipt)
