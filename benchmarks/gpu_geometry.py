"""Which tiles are fastest for our Triton kernels of dense attention on this GPU?

``python -m benchmarks.gpu_geometry``: forward without gradients, and forward and backward, each with one of its three
kernels in another geometry than ``pick_config`` takes.  ``--warm`` compiles every n-th candidate and times nothing, for
several processes at once.
"""

import contextlib
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from benchmarks.harness import console
from kernel_index.core.triton.launch import Config
from kernel_index.kernels.attention.dense_attention import geometry
from kernel_index.proofs.numerics import launch_errors
from kernel_index.proofs.tune import timing
from kernel_index.proofs.tune.attention_cells import CELLS, AttentionCell, AttentionInputs

OPS = ("attention",)
NAMES = ("causal 8k", "16 documents 32k", "head size 64 8k", "window 1024 32k")
KERNELS = ("forward", "queries", "keys")
SHAPES = ((64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8), (128, 64, 4))
STAGES = (2, 3)


def candidates(width: int) -> Iterator[tuple[str, Config]]:
    """Kernel by kernel, the geometry that is taken first."""
    for kernel in KERNELS:
        taken = geometry.pick_config(kernel, width, 2, geometry.target_of(torch.device("cuda", 0)))
        others = [Config(*shape, stages) for shape in SHAPES for stages in STAGES]
        yield kernel, taken
        yield from ((kernel, other) for other in others if other != taken._replace(registers=None))


@contextlib.contextmanager
def in_geometry(kernel: str, config: Config) -> Iterator[None]:
    """Inside, this kernel has this geometry, and the others what they always have."""
    original = geometry.pick_config

    def pick(name: str, *args: object) -> Config:
        return config if name == kernel else original(name, *args)  # type: ignore[arg-type]

    geometry.pick_config = pick
    try:
        yield
    finally:
        geometry.pick_config = original


def microseconds(inputs: AttentionInputs, kernel: str, warm: bool) -> float:
    """Of a call of the direction that the kernel serves; a wrong result is an error."""
    call = inputs.ours("triton")
    step = call if kernel == "forward" else inputs.train(call)
    known = inputs.truth()
    with torch.set_grad_enabled(kernel != "forward"):
        found = step()
        got = inputs.last(*found) if isinstance(found, tuple) else inputs.last(found)
        wanted = known[1:] if isinstance(found, tuple) else known[:1]
        error = max(timing.error_of(a, b) for a, b in zip(got, wanted, strict=True))
        if not error < 3e-2:
            raise AssertionError(f"relative error {error:.1e}")
        return 0.0 if warm else timing.device_us([step])[0]


def measure(cell: AttentionCell, warm: str) -> None:
    inputs, first = AttentionInputs(cell), dict[str, float]()
    for number, (kernel, config) in enumerate(candidates(cell.head_size)):
        if warm and number % int(warm.split("/")[1]) != int(warm.split("/")[0]):
            continue
        try:
            with in_geometry(kernel, config):
                us = microseconds(inputs, kernel, bool(warm))
        except (*launch_errors(), AssertionError) as error:
            console.print(f"{cell.name}: {kernel} {tuple(config)}: {' '.join(str(error).split())[:100]}")
            continue
        ratio = us / first.setdefault(kernel, us) if us else 1.0
        console.print(f"{cell.name}: {kernel} {tuple(config)}: {us / 1e3:.3f} ms, {ratio:.2f} of what is taken")


def main(
    only: Annotated[str, typer.Option(help="Only cells whose name contains this.")] = "",
    warm: Annotated[str, typer.Option(help="i/n: compile every n-th candidate and time nothing.")] = "",
) -> None:
    """Time the geometries of the Triton kernels of attention."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device")
    torch.cuda.set_stream(torch.cuda.Stream())
    for cell in (c for c in CELLS if c.name in NAMES and only in c.name):
        measure(cell, warm)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
