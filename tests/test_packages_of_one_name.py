"""FlashAttention 2 and flash-attn-4 install a package of one name, and either may be broken: ``auto`` goes on."""

import os
import subprocess
import sys

import pytest

EXPLAIN = """
import torch, kernel_index as ki
from kernel_index.core import rules
from kernel_index.core.target import Target, pretend
rules.interpreting = lambda: False
q, k, v = (torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
with pretend(Target("cuda", 90)):
    found = ki.explain("attention", q, k, v, ki.MaskContract())
print(found.would_run != "fa4", found.verdicts["fa4"])
"""
INSTALLED = {
    "version 2": ({"__init__.py": "flash_attn_func = None"}, "the flash_attn that is installed is another one"),
    "no CUTLASS": (
        {"__init__.py": "", "cute/__init__.py": "import cutlass_that_is_absent"},
        "flash-attn-4 cannot be imported: ModuleNotFoundError: No module named 'cutlass_that_is_absent'",
    ),
    "a library that is missing": (
        {"__init__.py": "", "cute/__init__.py": "raise OSError('libcute.so: cannot open')"},
        "flash-attn-4 cannot be imported: OSError: libcute.so: cannot open",
    ),
    "version 4": ({"__init__.py": "", "cute/__init__.py": ""}, None),
}


@pytest.mark.parametrize("which", INSTALLED)
def test_a_flash_attn_that_is_not_version_4_is_no_reason_to_fail(which, tmp_path):
    files, said = INSTALLED[which]
    for name, text in files.items():
        path = tmp_path / "flash_attn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", EXPLAIN],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    if said is None:
        assert "flash" not in run.stdout, run.stdout
    else:
        assert run.stdout.startswith("True")
        assert said in run.stdout
