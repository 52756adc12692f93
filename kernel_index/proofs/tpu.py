"""``kernel-index prove tpu``: every Pallas kernel compiled by libtpu for TPUs that are not here, and what came of it.

Nothing is executed.  Each compilation is a process of its own, with libtpu's dumps read back.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_index.proofs.tpu_dumps import FLAGS, PROFILE, KernelFigures, figures, kernels_named

GENERATIONS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "7x": "tpu7x:2x2x1"}
CASES = ("attention", "clustered", "clustered-hierarchical", "splash")
KERNELS = ("attention_", "clustered_", "splash_")
TIME_LIMIT = 900.0


@dataclass(frozen=True)
class Compiled:
    """One case for one generation.  ``memory`` is libtpu's account of HBM, in bytes; no ``error`` if it compiled."""

    case: str
    generation: str
    tokens: int
    kernels: tuple[KernelFigures, ...] = ()
    memory: dict[str, int] = field(default_factory=dict, hash=False)
    error: str = ""

    def kernel(self, part: str) -> KernelFigures:
        return kernels_named(self.kernels, part)[0]


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    for package in ("jax", "libtpu"):
        if importlib.util.find_spec(package) is None:
            return f"needs the {package} package: pip install 'kernel-index[tpu]'"
    return None


def prove(
    generations: tuple[str, ...], cases: tuple[str, ...], tokens: tuple[int, ...], *, cycles: bool = False
) -> Iterator[Compiled]:
    """Compile forward and backward of each case, one process after the other."""
    for length in tokens:
        for case in cases:
            for generation in generations:
                yield compile_case(case, generation, length, cycles=cycles)


def compile_case(case: str, generation: str, tokens: int, *, cycles: bool = False, forward: bool = False) -> Compiled:
    with tempfile.TemporaryDirectory(prefix="kernel-index-") as name:
        folder = Path(name)
        flags = (*FLAGS, PROFILE) if cycles else FLAGS
        done = _run(case, generation, tokens, [f.format(folder=folder) for f in flags], forward)
        if done.returncode and cycles:  # the profiler itself aborts on some programs; the compiler does not
            done = _run(case, generation, tokens, [f.format(folder=folder) for f in FLAGS], forward)
        if done.returncode:
            return Compiled(case, generation, tokens, error=_last_words(done.stderr))
        memory = json.loads(done.stdout.strip().splitlines()[-1])
        found = tuple(kernels_named(figures(folder), *KERNELS))
    return Compiled(case, generation, tokens, found, memory)


def _run(case: str, generation: str, tokens: int, flags: list[str], forward: bool) -> Any:
    command = [sys.executable, "-m", "kernel_index.proofs.tpu_child", case, GENERATIONS[generation], str(tokens)]
    environment = dict(os.environ, LIBTPU_INIT_ARGS=" ".join(flags), JAX_PLATFORMS="cpu")
    return subprocess.run(
        [*command, *(["--forward"] if forward else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


def _last_words(stderr: str) -> str:
    lines = [line for line in stderr.strip().splitlines() if "Error" in line or "error" in line]
    return (lines or stderr.strip().splitlines() or ["no message"])[-1][:300]
