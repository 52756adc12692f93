"""The program of a proof: ``fa4.py`` with its parameters filled in."""

import json
from pathlib import Path
from typing import Literal

from kernel_index.kernels.attention.dense_fa4_execute_proof.request import ProofRequest

ProofMode = Literal["execute", "compile"]
SCHEMA = "kernel_index.fa4_execute_proof/1"
PARAMETERS_LINE = "PARAMETERS: dict[str, Any] = {}\n"


def emit(request: ProofRequest, mode: ProofMode, device: str) -> str:
    """A program that needs torch and flash-attn-4 alone; run it with ``python program.py REPORT.json``."""
    source = Path(__file__).with_name("fa4.py").read_text()
    assert source.count(PARAMETERS_LINE) == 1
    parameters = request.to_json() | {"mode": mode, "device": device}
    return source.replace(PARAMETERS_LINE, f"PARAMETERS: dict[str, Any] = json.loads({json.dumps(parameters)!r})\n")
