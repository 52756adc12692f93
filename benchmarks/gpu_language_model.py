"""What do the kernels bring to a training step of the presets for a GPU, and what does ``torch.compile`` add to them?

``python -m benchmarks.gpu_language_model``: forward + backward under bfloat16 autocast, ``small`` on 16 rows of 2048
tokens and ``base`` on 4 rows of 8192 with recomputation and without, 4 documents in each row; contenders take turns.
MFU is against 790 TFLOP/s, without the head for the token after the next.  Peaks are of PyTorch's allocator, with
parameters, gradients and activations.  ``--fits`` tries how many rows of ``base`` fit without recomputation.

Predicted: 3 times the plain path's speed at half its memory, since that keeps every activation in float32 and masks
scores densely.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

import kernel_index as ki
from benchmarks.gpu_ceiling import PRODUCTS
from benchmarks.gpu_session import Rows, add_row
from benchmarks.harness import console, duration
from benchmarks.language_model import NAMES, packed
from kernel_index.core.numerics import Mode
from kernel_index.lm.captured import CapturedStep, GraphRecorder, RecordingError
from kernel_index.lm.config import PRESETS
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel, flops_per_token
from kernel_index.lm.train import forced_backend

COMPILED = "kernel_index under torch.compile"
RECORDED = "kernel_index as a CUDA graph"
SIZES = (("small", 16, False), ("base", 4, True), ("base", 4, False))
"""Presets, their rows, and whether blocks are computed again in the backward pass."""


def model_and_batch(name: str, rows: int, recompute: bool) -> tuple[LanguageModel, Batch]:
    config = replace(PRESETS[name].model, ahead=0.0)
    torch.manual_seed(0)
    model = LanguageModel(config).cuda()
    for block in model.hybrid_blocks():
        block.recompute = recompute
    return model, Batch(*(t.cuda() for t in packed(config, rows, 4)))


def captured_step(model: LanguageModel, batch: Batch) -> CapturedStep:
    """Forward and backward as ``kernel-index train`` runs them on one GPU."""

    def gradients(batch: Batch, share: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch) * share
        loss.backward()
        return loss.detach()

    return CapturedStep(gradients, model.parameters(), GraphRecorder(batch.tokens.device))


def recorded_step(model: LanguageModel, batch: Batch, mode: Mode = "ordinary") -> Callable[[], None]:
    """The same, call by call; with the order of documents, which is no part of the graph."""
    captured = captured_step(model, batch)
    share = torch.ones((), device="cuda")

    def step() -> None:
        with ki.numerics(mode):
            captured(model.in_order(batch), share)
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    return step


def steps(name: str, rows: int, recompute: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each contender and its step, over one model and one batch."""
    model, batch = model_and_batch(name, rows, recompute)

    def step(forward: Callable[[Batch], torch.Tensor], backend: str) -> None:
        with forced_backend(backend), torch.autocast("cuda", torch.bfloat16):
            forward(batch).backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    for contender, backend in NAMES.items():
        yield contender, lambda backend=backend: step(model, backend)
    yield RECORDED, recorded_step(model, batch)
    if name == "small":  # the other one compiles for many minutes
        compiled = torch.compile(model, fullgraph=True)
        yield COMPILED, lambda: step(compiled, "auto")


def peak(step: Callable[[], None]) -> float:
    """GiB of a step, the first of which compiles."""
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):  # the third call of a step may record it
        step()
    return torch.cuda.max_memory_allocated() / 2**30


def title(name: str, rows: int, recompute: bool) -> str:
    return f"{name}, {rows} rows{', recomputation' if recompute else ''}"


def compare(name: str, rows: int, recompute: bool, rounds: int, contender: str, out: Path | None) -> None:
    """Time the contenders in turn; one that the memory does not hold is left out."""
    found = {who: step for who, step in steps(name, rows, recompute) if contender in who}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for who, step in found.items():
        try:
            peaks[who], seconds[who] = peak(step), []
        except (torch.OutOfMemoryError, RecordingError) as error:
            why = str(error).splitlines()[0][:120]
            console.print(f"{title(name, rows, recompute)}: {who}: left out: {why}", highlight=False)
    for _ in range(rounds):
        for who, times in seconds.items():
            start = time.perf_counter()
            found[who]()
            times.append(time.perf_counter() - start)
    config = replace(PRESETS[name].model, ahead=0.0)
    tokens, flops = rows * config.context, flops_per_token(config)
    for who, times in seconds.items():
        median = statistics.median(times)
        speed = f"{duration(median)}, {tokens / median:,.0f} tokens/s, {100 * flops * tokens / median / PRODUCTS:.1f} %"
        model = title(name, rows, recompute)
        console.print(f"{model}: {who}: {speed}, peak {peaks[who]:.1f} GiB", highlight=False)
        row = {"model": model, "contender": who, "ms": round(1e3 * median, 1), "tokens_s": round(tokens / median)}
        row |= {"mfu": round(flops * tokens / median / PRODUCTS, 3), "GiB": round(peaks[who], 1)}
        add_row(out, "models", row)


def rows_that_fit(name: str = "base", most: int = 64) -> int:
    """Rows of a step without recomputation, doubled until the memory is full, then halved into."""
    low, high = 0, most
    rows = 4
    while high - low > 1:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            model, batch = model_and_batch(name, rows, recompute=False)
            with torch.autocast("cuda", torch.bfloat16):
                model(batch).backward()
            low = rows
            console.print(f"{name}: {rows} rows: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", highlight=False)
        except torch.OutOfMemoryError:
            high = rows
        model = batch = None
        rows = min(2 * rows, most) if high == most else (low + high) // 2
    return low


def main(
    rounds: Annotated[int, typer.Option(help="Steps that are timed; the median counts.")] = 5,
    only: Annotated[str, typer.Option(help="Only sizes whose title contains this.")] = "",
    contender: Annotated[str, typer.Option(help="Only contenders whose name contains this.")] = "",
    fits: Annotated[bool, typer.Option(help="Also how many rows of base fit without recomputation.")] = False,
    out: Rows = None,
) -> None:
    """Time training steps of the presets for a GPU."""
    console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    for size in SIZES:
        if only in title(*size):
            compare(*size, rounds, contender, out)
            gc.collect()
            torch.cuda.empty_cache()
    if fits:
        console.print(f"base: {rows_that_fit()} rows fit without recomputation", highlight=False)


if __name__ == "__main__":
    typer.run(main)
