"""What do the kernels bring to a training step of the presets for a GPU, and what does ``torch.compile`` add to them?

``python -m benchmarks.gpu_language_model``: forward + backward under bfloat16 autocast, ``small`` on 16 rows of 2048
tokens and ``base`` on 4 rows of 8192 with recomputation, 4 documents in each row; contenders take turns.  Peaks are of
PyTorch's allocator, with parameters, gradients and activations.

Predicted: 3 times the plain path's speed at half its memory, since that keeps every activation in float32 and masks
scores densely.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.harness import console, duration
from benchmarks.language_model import NAMES, packed
from kernel_index.lm.captured import CapturedStep, GraphRecorder
from kernel_index.lm.config import PRESETS
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.train import forced_backend

COMPILED = "kernel_index under torch.compile"
RECORDED = "kernel_index as a CUDA graph"
SIZES = (("small", 16, False), ("base", 4, True))
"""Presets, their rows, and whether blocks are computed again in the backward pass."""


def model_and_batch(name: str, rows: int, recompute: bool) -> tuple[LanguageModel, Batch]:
    config = replace(PRESETS[name].model, ahead=0.0)
    torch.manual_seed(0)
    model = LanguageModel(config).cuda()
    for block in model.hybrid_blocks():
        block.recompute = recompute
    return model, Batch(*(t.cuda() for t in packed(config, rows, 4)))


def recorded_step(model: LanguageModel, batch: Batch) -> Callable[[], None]:
    """The step as ``kernel-index train`` runs it on one GPU."""

    def gradients(batch: Batch, share: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch) * share
        loss.backward()
        return loss.detach()

    captured = CapturedStep(gradients, model.parameters(), GraphRecorder(batch.tokens.device))
    share = torch.ones((), device="cuda")

    def step() -> None:
        captured(batch, share)
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
    if not recompute:
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


def main(rounds: int = 5) -> None:
    console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    for name, rows, recompute in SIZES:
        contenders = dict(steps(name, rows, recompute))
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        peaks = {contender: peak(step) for contender, step in contenders.items()}
        for _ in range(rounds):
            for contender, step in contenders.items():
                start = time.perf_counter()
                step()
                seconds[contender].append(time.perf_counter() - start)
        tokens = rows * PRESETS[name].model.context
        plain = statistics.median(seconds["the plain path"])
        for contender, times in seconds.items():
            median = statistics.median(times)
            speed = (
                f"{duration(median)}, {tokens / median:,.0f} tokens/s, {median / plain:.2f} of the plain path's time"
            )
            console.print(f"{name}: {contender}: {speed}, peak {peaks[contender]:.1f} GiB")


if __name__ == "__main__":
    main()
