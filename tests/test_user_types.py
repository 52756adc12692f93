"""What a user's type checker says about a file that uses the package: nothing, in its strictest mode."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKER = shutil.which("basedpyright", path=str(Path(sys.executable).parent))

USERS_FILE = """
import torch
from torch import nn

import kernel_index as ki

x = torch.ones(2, 8, 4, 16)
out: torch.Tensor = ki.attention(x, x, x)
with ki.receipts() as log:
    ki.fused_relu_squared(x)
ran = log[0].ran
print(f"{ran}, {log[0].op}")
print(ki.explain("fused_relu_squared", x))
with ki.force("reference"):
    y: torch.Tensor = ki.attention(x, x, x, mask=ki.MaskContract(), backend="reference")
model = nn.Linear(4, 4)
report = ki.transformers.apply(model)
print(report)
report.undo()
layer: nn.Module = ki.nn.SwiGLUMLP(16, 32)
print(ki.jax.attention)
"""

WRONG = "\nki.attention(x, x)\nki.no_such_function(x)\nki.fused_relu_squared(x, backend='tritn')\n"


def complaints(folder: Path, source: str) -> list[str]:
    (folder / "users_file.py").write_text(source)
    settings = {"typeCheckingMode": "strict", "pythonVersion": "3.11", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [str(CHECKER), "--outputjson", "--pythonpath", sys.executable, "users_file.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [f"{d['range']['start']['line']}: {d['message']}" for d in found if d["severity"] == "error"]


@pytest.mark.skipif(CHECKER is None, reason="needs basedpyright, of the dev extra")
def test_a_users_file_passes_in_strict_mode(tmp_path):
    assert complaints(tmp_path, USERS_FILE) == []


@pytest.mark.skipif(CHECKER is None, reason="needs basedpyright, of the dev extra")
def test_wrong_calls_are_found(tmp_path):
    assert len(complaints(tmp_path, USERS_FILE + WRONG)) >= 3
