"""How fast is a mixture of experts on a GPU, part by part, beside SonicMoE, quack, Liger-Kernel and PyTorch?

``python -m benchmarks.gpu_experts --out FILE``: router, dispatch, the first grouped product, combine, and the whole
layer behind its router, in bfloat16, forward and both ways.  ``us`` are the sums of the kernels in a profile, ``clock``
what eager calls one after another take, ``memory`` what a step holds at most beyond its leaves, MiB.  Sizes are those
of the presets ``small`` and ``base`` and of one large layer.  A contender that cannot run is named with its error.

Predicted on an H200 for the large layer, both ways: products 12.5 ms at 790 TFLOP/s and about 17 as they run; gathers,
activation and sums 2.8 ms, of which SonicMoE has about 0.8.
"""

import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_expert_calls import CELLS, TINY, Call, Cell, Inputs, Part, parts
from benchmarks.gpu_session import DryRun, LeftOut, Only, Out, Seconds, Session, Warm
from benchmarks.harness import console
from kernel_index.core.terminal import print_table
from kernel_index.proofs.tune import timing

DIRECTIONS = ("forward", "both")


def kernels_us(step: Callable[[], object], repeats: int = 5) -> float:
    """The sum of a step's kernels, microseconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / repeats


def clock_us(step: Callable[[], object], repeats: int = 5, calls: int = 4) -> float:
    """Eager calls one after another; the median of several rounds."""

    def several() -> None:
        for _ in range(calls):
            step()

    return 1e6 * statistics.median(timing.elapsed(several) for _ in range(repeats)) / calls


def memory_mib(step: Callable[[], object]) -> float:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class Measure:
    """The times of one contender of a part, and how far its results are from those of the first."""

    def __init__(self, session: Session, part: Part):
        self.dry, self.part, self.exact = session.dry or bool(session.warm), part, None

    def __call__(self, call: Call) -> dict[str, Any]:
        part = self.part
        out = call()
        upstream = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(2), device=out.device)
        upstream = upstream.to(out.dtype)

        def forward() -> Tensor:
            with torch.no_grad():
                return call()

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(call(), part.leaves, upstream)

        got = [out.detach(), *both()]
        exact = self.exact = got if self.exact is None else self.exact
        error = max(timing.error_of(*pair) for pair in zip(got, exact, strict=True))
        if not error < part.tolerance:
            raise LeftOut(f"its results are {error:.1e} apart")
        row: dict[str, Any] = {"error": float(f"{error:.1e}")}
        del out, got
        if self.dry:
            return row | {name: {"us": 1.0, "clock": 1.0} for name in DIRECTIONS} | {"memory": 1.0}
        for name, step in zip(DIRECTIONS, (forward, both), strict=True):
            step()
            row[name] = {"us": round(kernels_us(step), 1), "clock": round(clock_us(step), 1)}
        row["memory"] = round(memory_mib(both), 0)
        console.print(f"{part.name}: {row}", highlight=False)  # others may take minutes to compile
        return row


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours ÷ the best of the others, by the kernels, by the clock and in memory, and whose it is."""
    others = {name: row for name, row in found.items() if not name.startswith("kernel_index")}
    ours = next((row for name, row in found.items() if name not in others), None)
    if ours is None or not others:
        return {}
    compared: dict[str, Any] = {}
    for direction in DIRECTIONS:
        for by in ("us", "clock"):
            peer = min(others, key=lambda name: others[name][direction][by])
            compared[f"{direction} {by}"] = [round(ours[direction][by] / others[peer][direction][by], 3), peer]
    peer = min(others, key=lambda name: others[name]["memory"])
    return compared | {"memory": [round(ours["memory"] / max(1.0, others[peer]["memory"]), 3), peer]}


def name_of(cell: Cell, part: str) -> str:
    return f"{cell.name} {cell.activation} {part}"


def measure_cell(session: Session, cell: Cell, names: str) -> None:
    done = {row["case"] for row in session.rows()}
    device = "cpu" if session.dry else "cuda"
    inputs = Inputs(cell, device)
    for part in parts(inputs):
        case = name_of(cell, part.name)
        if not session.wants(case, case in done):
            continue
        given = {name: make for name, make in part.calls.items() if not names or name in names.split(";")}
        found = session.measured(case, given, Measure(session, part))
        row = {"case": case, "flops": part.flops, "contenders": found, "ratio": ratios(found)}
        session.add(row)
        show(row)


def show(row: dict[str, Any]) -> None:
    lines = []
    for name, of in row["contenders"].items():
        line = [name]
        for direction, products in zip(DIRECTIONS, (1, 3), strict=True):
            us = of[direction]["us"]
            line.append(f"{us:.0f}, {of[direction]['clock']:.0f}")
            line.append(f"{products * row['flops'] / us / 1e6:.0f}" if row["flops"] else "")
        lines.append([*line, f"{of['memory']:.0f}", f"{of['error']:.0e}"])
    head = ("", "forward, µs, clock", "TFLOP/s", "both", "TFLOP/s", "MiB", "apart")
    print_table(console, head, lines, row["case"])
    said = "; ".join(f"{name} {ratio[0]:.2f} of {ratio[1]}" for name, ratio in row["ratio"].items())
    console.print(f"ours ÷ the best other: {said or 'alone'}", highlight=False)


def main(
    out: Out,
    only: Only = "",
    seconds: Seconds = 540.0,
    dry_run: DryRun = False,
    warm: Warm = "",
    names: Annotated[str, typer.Option(help="Only contenders of these names, separated by semicolons.")] = "",
) -> None:
    """Time a mixture of experts beside its peers."""
    session = Session("experts", Path(out), only, seconds, dry_run, warm)
    for cell in TINY if dry_run else CELLS:
        if any(part in name_of(cell, name) for part in session.only for name in PARTS):
            measure_cell(session, cell, names)
    session.content["left_out"] = session.left_out
    session.save()


PARTS = ("router", "dispatch", "product", "combine", "layer")


if __name__ == "__main__":
    typer.run(main)
