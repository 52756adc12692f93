"""The program of a proof: ``fa4.py`` with its parameters filled in."""

import json
from pathlib import Path

from kernel_index.kernels.attention.dense_fa4_execute_proof.request import ProofRequest

SCHEMA = "kernel_index.fa4_execute_proof/1"
PLACE = "PARAMETERS: dict[str, Any] = {}\n"


def emit(request: ProofRequest, mode: str, device: str) -> str:
    """A program that needs torch and flash-attn-4 alone; ``python program.py REPORT.json`` runs it anywhere."""
    source = Path(__file__).with_name("fa4.py").read_text()
    assert source.count(PLACE) == 1
    parameters = request.to_json() | {"mode": mode, "device": device}
    return source.replace(PLACE, f"PARAMETERS: dict[str, Any] = json.loads({json.dumps(parameters)!r})\n")
