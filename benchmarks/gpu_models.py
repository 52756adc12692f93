"""Every table of the models' figures on a GPU, into one file: what ``benchmarks/results`` keeps of them.

``python -m benchmarks.gpu_models --out FILE``: one process after another, each of which adds its rows to the file.  A
table alone is its own command with the same ``--out``:

=================  =====================================
``memory_bound``   ``benchmarks.gpu_memory_bound``
``experts``        ``benchmarks.gpu_experts``
``loss``           ``benchmarks.gpu_loss``
``models``         ``benchmarks.gpu_dense``, ``benchmarks.gpu_language_model``
``ssd_scan``, …    ``benchmarks.gpu_state_space``
``cold_start``     ``benchmarks.gpu_cold_start``
=================  =====================================
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness import console

COMMANDS = (
    "gpu_cold_start", "gpu_language_model", "gpu_dense", "gpu_loss", "gpu_experts", "gpu_state_space",
    "gpu_memory_bound",
)  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="The file of figures; a new one, or one of this machine, commit and day.")],
    only: Annotated[str, typer.Option(help="Only these commands, separated by commas.")] = "",
) -> None:
    """Measure all tables, or some; a command that fails is named at the end and keeps no other from running."""
    wanted = only.split(",") if only else list(COMMANDS)
    if unknown := sorted(set(wanted) - set(COMMANDS)):
        raise typer.BadParameter(f"--only must be of {', '.join(COMMANDS)}, got {', '.join(unknown)}")
    failed = []
    for name in wanted:
        console.print(f"benchmarks.{name}", highlight=False)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        console.print(f"failed: {', '.join(failed)}", highlight=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
