"""The README's first snippet runs anywhere in seconds, prints what it says, and needs no compiler."""

import os
import re
import subprocess
import sys

from docs import pages


def test_the_first_snippet(tmp_path):
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (pages.REPOSITORY / "README.md").read_text(), re.M | re.S)[:1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "KERNEL_INDEX_", "CXX"))}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(pages.REPOSITORY)}  # no compiler is found
    done = subprocess.run(
        [sys.executable, "-c", snippet], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"loss \d\.\d\d, by (chunked|triton)\n", done.stdout)
    assert "fused_linear_cross_entropy: backend='auto' would run" in done.stdout
    assert done.stderr == ""
