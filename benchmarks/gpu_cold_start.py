"""How long does the first step of ``kernel-index train --compile`` take on a GPU, with nothing in any cache?

``python -m benchmarks.gpu_cold_start``: the preset ``small``, forward and backward, in a process of its own whose
caches of Inductor and Triton are new folders.  Target: 60 s.  PyTorch's own account says where they went.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from benchmarks.gpu_language_model import model_and_batch
from benchmarks.gpu_session import Rows, add_row, needs_gpu
from benchmarks.harness import console

LONGEST = 14
"""Lines of PyTorch's account that are printed."""


def kernels_compiled_here() -> list[float]:
    """The seconds of each kernel that Triton compiles in this process from now on; -1 of one that its cache has."""
    seconds: list[float] = []

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        seconds.append(-1.0 if cache_hit else times.total / 1e6)

    triton.knobs.compilation.listener = listen
    return seconds


def first_steps(how: str, out: Path | None, name: str = "small", rows: int = 16, steps: int = 3) -> None:
    """Seconds of the first steps of a compiled model, then PyTorch's account of compiling."""
    model, batch = model_and_batch(name, rows, recompute=False)
    compiled = torch.compile(model, fullgraph=True) if how == "whole" else model
    if how == "blocks":
        model.compile_blocks()
    kernels, seconds = kernels_compiled_here(), list[float]()
    for step in range(steps):
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(batch)
        loss.backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        console.print(f"{name}, {how}, step {step + 1}: {seconds[-1]:.2f} s", highlight=False)
    row = {"case": f"{name}, {how}", "first_step_s": round(seconds[0], 1), "later_step_s": round(seconds[-1], 2)}
    add_row(out, "cold_start", row)
    here = [took for took in kernels if took >= 0]
    found = len(kernels) - len(here)
    console.print(f"  {sum(here):7.2f} s in {len(here)} kernels of Triton, {found} more in its cache", highlight=False)
    spent = torch._dynamo.utils.compilation_time_metrics
    for phase, seconds in sorted(spent.items(), key=lambda item: -sum(item[1]))[:LONGEST]:
        console.print(f"  {sum(seconds):7.2f} s in {len(seconds)}: {phase}", highlight=False)


def main(
    how: Annotated[str, typer.Option(help="blocks, as the command does; whole; or eager.")] = "blocks",
    out: Rows = None,
) -> None:
    """Time the first steps of ``small`` with empty caches."""
    needs_gpu()
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, "-m", __spec__.name, "inner", how, *([str(out)] if out else [])]
        subprocess.run(command, env=os.environ | caches, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["inner"]:
        first_steps(sys.argv[2], Path(sys.argv[3]) if sys.argv[3:] else None)
    else:
        typer.run(main)
