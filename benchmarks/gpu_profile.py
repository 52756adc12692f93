"""Where does the time of a training step on a GPU go: by block letter and by kind of kernel?

``python -m benchmarks.gpu_profile``: one step of each preset for a GPU, as in ``benchmarks.gpu_language_model``.  Time
between two kernels is a gap.  A kernel belongs to the letter whose forward or backward launched it; norms, the residual
stream, embeddings and the loss are ``rest``, and shared experts ``mlp``.  Beside it stands the least time of each
letter, ``benchmarks.gpu_ceiling``, where shared experts are part of ``E``.
"""

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_ceiling import PRODUCTS, ceilings
from benchmarks.gpu_language_model import SIZES, model_and_batch, title
from benchmarks.gpu_session import needs_gpu
from benchmarks.harness import console
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel, flops_per_token

OPS = ("fused_linear_cross_entropy",)

KINDS = {
    "float32 product": ("sgemm", "gemm_f32f32", "simt", "f32_f32_f32"),
    "product": ("gemm", "nvjet", "cutlass", "gemv", "splitk", "grouped", "grid_mm"),
    "attention": ("flash", "attn", "attention", "fmha"),
    "gather": ("index", "gather", "scatter", "embedding", "take"),
    "copy": ("memcpy", "memset", "copy", "catarray", "fill"),
    "elementwise": ("elementwise", "vectorized"),
    "reduction": ("reduce", "softmax", "scan", "sort", "cumsum", "norm_kernel"),
}
"""The first kind of which a word is in the kernel's name; ``ours`` where Triton made it of our modules."""

LETTERS = {"Attention": "A", "SparseAttention": "S", "MLA": "L", "Mamba2": "M", "Experts": "E"} | dict.fromkeys(
    ("SquaredReLUMLP", "SwiGLUMLP"), "mlp"
)


class Kernel(NamedTuple):
    """A kernel on the device; microseconds.  ``launched``: when the host asked for it."""

    name: str
    begin: float
    length: float
    launched: float


def kind_of(name: str) -> str:
    small = name.lower()
    if small.endswith("_kernel") and "::" not in small:
        return "ours"
    return next((kind for kind, words in KINDS.items() if any(word in small for word in words)), "other")


def letter_of(module: nn.Module) -> str | None:
    return next((letter for name, letter in LETTERS.items() if type(module).__name__ == name), None)


@contextmanager
def marked(model: LanguageModel) -> Iterator[None]:
    """Inside, forward and backward of each mixer and feed-forward layer are ranges of the profiler."""
    handles = [h for module in model.modules() if (letter := letter_of(module)) for h in _mark(module, letter)]
    try:
        with torch.autograd.set_multithreading_enabled(False):  # ranges of the backward pass nest as well
            yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(module: nn.Module, letter: str) -> list[Any]:
    """The backward range is between the gradient of the first output and that of the first input."""
    open_ranges: list[Any] = []

    def enter(*_: object) -> None:
        open_ranges.append(record_function(f"letter {letter}"))
        open_ranges[-1].__enter__()

    def leave(*_: object) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    def begins(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        own = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in inputs)  # others may read the same tensor
        _first_hook(own, leave)
        enter()
        return own

    def ends(_: nn.Module, __: object, outputs: Any) -> None:
        leave()
        _first_hook(outputs if isinstance(outputs, tuple) else (outputs,), enter)

    return [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]


def _first_hook(tensors: tuple[Any, ...], call: Callable[..., None]) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(call)
            return


def trace(step: Callable[[], None]) -> dict[str, list[dict[str, Any]]]:
    """The profiler's events of one step, by category."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    by_category = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            by_category[event.get("cat", "")].append(event)
    return by_category


def kernels_of(events: dict[str, list[dict[str, Any]]]) -> list[Kernel]:
    launches = {
        event["args"]["correlation"]: event["ts"]
        for category in ("cuda_runtime", "cuda_driver")
        for event in events[category]
        if "correlation" in event.get("args", {})
    }
    on_device = [e for category in ("kernel", "gpu_memcpy", "gpu_memset") for e in events[category]]
    kernels = [Kernel(e["name"], e["ts"], e["dur"], launches.get(e["args"].get("correlation"), -1)) for e in on_device]
    return sorted(kernels, key=lambda kernel: kernel.begin)


def letters_of(kernels: list[Kernel], events: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of each kernel, the innermost range in which it was launched."""
    ranges = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events["user_annotation"] if "letter " in e["name"]]
    ranges.sort()
    of_kernel = {}
    stack, at = list[tuple[float, float, str]](), 0
    for kernel in sorted(kernels, key=lambda kernel: kernel.launched):
        while at < len(ranges) and ranges[at][0] <= kernel.launched:
            stack.append(ranges[at])
            at += 1
        while stack and stack[-1][1] < kernel.launched:
            stack.pop()
        of_kernel[kernel] = stack[-1][2].removeprefix("letter ") if stack else "rest"
    return [of_kernel[kernel] for kernel in kernels]


def report(title: str, step: Callable[[], None]) -> None:
    events = trace(step)
    kernels = kernels_of(events)
    letters = letters_of(kernels, events)
    gaps = sum(max(0.0, b.begin - a.begin - a.length) for a, b in pairwise(kernels))
    busy = sum(kernel.length for kernel in kernels)
    console.print(f"{title}: {len(kernels)} kernels, busy {busy / 1e3:.1f} ms, gaps {gaps / 1e3:.1f} ms")
    table: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    names: Counter[tuple[str, str, str]] = Counter()
    for kernel, letter in zip(kernels, letters, strict=True):
        cell = table[letter, kind_of(kernel.name)]
        cell[0] += kernel.length
        cell[1] += 1
        names[letter, kind_of(kernel.name), kernel.name[:90]] += kernel.length
    for letter in sorted({letter for letter, _ in table}):
        cells = {kind: found for (of, kind), found in table.items() if of == letter}
        total = sum(us for us, _ in cells.values())
        longest_first = sorted(cells.items(), key=lambda cell: -cell[1][0])
        parts = ", ".join(f"{kind} {us / 1e3:.1f} ({int(n)})" for kind, (us, n) in longest_first)
        console.print(f"  {letter}: {total / 1e3:.1f} ms ({100 * total / busy:.0f} %): {parts}")
    for (letter, kind, name), us in names.most_common(25):
        console.print(f"    {us / 1e3:7.2f} ms {letter} {kind}: {name}", highlight=False)


def main(
    rounds: Annotated[int, typer.Option(help="Steps before the one that is profiled; the first ones compile.")] = 2,
    only: Annotated[str, typer.Option(help="Only sizes whose title contains this.")] = "",
) -> None:
    """Profile a training step of each preset for a GPU."""
    needs_gpu()
    console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    for name, rows, recompute in SIZES:
        if only not in title(name, rows, recompute):
            continue
        model, batch = model_and_batch(name, rows, recompute)

        def step(model: LanguageModel = model, batch: Batch = batch) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                model(batch).backward()
            model.zero_grad(set_to_none=True)

        for _ in range(rounds):
            step()
        with marked(model):
            report(title(name, rows, recompute), step)
        limits, tokens = ceilings(model.config, batch.tokens.numel(), recompute), batch.tokens.numel()
        least = sum(limits.values())
        share = flops_per_token(model.config) * tokens / least / PRODUCTS
        parts = ", ".join(f"{letter} {1e3 * seconds:.1f}" for letter, seconds in sorted(limits.items()))
        console.print(f"  at least {1e3 * least:.1f} ms, {100 * share:.0f} % of {PRODUCTS / 1e12:.0f} TFLOP/s: {parts}")


if __name__ == "__main__":
    typer.run(main)
