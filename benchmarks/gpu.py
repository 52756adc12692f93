"""Every Triton kernel on a GPU: right within derived budgets, then timed against what a user would take instead.

``python -m benchmarks.gpu --out DIR`` writes ``gpu.json`` and prints tables.  Times are medians of device time, taken
from replays of a CUDA graph where the call can be captured (eager launch gaps are then out of every contender's time),
over inputs that do not fit the L2 cache together.  ``share`` is compulsory bytes ÷ time ÷ measured copy bandwidth.
Off a GPU, ``--dry-run`` runs the same script through Triton's interpreter on small sizes.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch._functorch import config as functorch

import kernel_index as ki
from benchmarks.gpu_large import LARGE, large, large_dropout
from benchmarks.gpu_questions import questions
from benchmarks.harness import Question, console
from kernel_index.proofs.numerics import launch_errors

SLOW = 0.02
"""Seconds from which on a call is measured ten times alone, instead of twenty times five in a row."""


@dataclass
class Line:
    """One contender in one direction: seconds, extra bytes, and the share of the copy bandwidth."""

    question: str
    direction: str
    contender: str
    seconds: float
    how: str
    share: float | None = None
    memory: int | None = None


def device_seconds(call: Callable[[], object], dry: bool) -> tuple[float, str]:
    """Median device time of a call, by graph replay, else by events around eager calls."""
    if dry:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, "dry run"
    warm_up = time.perf_counter() + 0.05
    while time.perf_counter() < warm_up:
        call()
        torch.cuda.synchronize()
    graph, repeats, how, replay = torch.cuda.CUDAGraph(), 1, "events", call
    slow = elapsed(call) > SLOW
    many = 1 if slow else 5
    try:
        # On the current stream: autograd runs a backward pass on the stream of its forward.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(many):
                call()
        repeats, how, replay = many, "graph", graph.replay
    except RuntimeError as error:  # the call synchronises, which cannot be captured
        console.print(f"not captured: {str(error)[:120]}", highlight=False)
        torch.cuda.synchronize()
    return statistics.median(elapsed(replay) / repeats for _ in range(10 if slow else 20)), how


def elapsed(call: Callable[[], object]) -> float:
    """Seconds on the device, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(dry: bool) -> float:
    """Bytes read and written per second by a large copy, launched eagerly: a graph's copy node is slower."""
    if dry:
        return 1e9
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / statistics.median(elapsed(lambda: target.copy_(source)) for _ in range(20))


def flatten(result: Any) -> list[torch.Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad]


def measure(question: Question, bandwidth: float, dry: bool) -> list[Line]:
    lines = []
    for name, function in question.contenders.items():
        try:
            lines += measure_contender(question, name, function, bandwidth, dry)
        except launch_errors() as error:
            what = f"{type(error).__name__}: {str(error)[:300]}"
            console.print(f"[red]{question.name}, {name}: {what}[/]", highlight=False)
        if not dry:
            torch.cuda.empty_cache()
    return lines


def measure_contender(q: Question, name: str, function: Callable, bandwidth: float, dry: bool) -> list[Line]:
    args = q.inputs()
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    out = flatten(function(*args))
    upstream = [torch.randn_like(o) for o in out]

    def both() -> object:
        return torch.autograd.grad(flatten(function(*args)), leaves, upstream)

    memory = extra_memory(both, dry) if q.memory else None

    if q.together:
        return [Line(q.name, "forward + backward", name, *device_seconds(both, dry), memory=memory)]

    def share(index: int, seconds: float) -> float | None:
        return None if q.bytes is None else q.bytes[index] / seconds / bandwidth

    def backward() -> object:
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    forward_time, how = device_seconds(lambda: function(*args), dry)
    backward_time, how_back = device_seconds(backward, dry)
    return [
        Line(q.name, "forward", name, forward_time, how, share(0, forward_time), memory),
        Line(q.name, "backward", name, backward_time, how_back, share(1, backward_time), memory),
    ]


def extra_memory(call: Callable[[], object], dry: bool) -> int | None:
    if dry:
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def show(question: Question, lines: list[Line]) -> None:
    table = Table("direction", "contender", "µs", "ours ÷ it", "share of copy", "extra MiB", "by", title=question.name)
    for direction in dict.fromkeys(line.direction for line in lines):
        rows = [line for line in lines if line.direction == direction]
        ours = next((r.seconds for r in rows if r.contender == "kernel_index"), None)
        for r in rows:
            ratio = "" if ours is None or r.contender == "kernel_index" else f"{ours / r.seconds:.2f}"
            share = "" if r.share is None else f"{100 * r.share:.0f} %"
            memory = "" if r.memory is None else f"{r.memory / 2**20:,.0f}"
            table.add_row(direction, r.contender, f"{r.seconds * 1e6:,.1f}", ratio, share, memory, r.how)
    console.print(table)


def prove(dry: bool, ops: tuple[str, ...] | None, backend: str = "triton") -> dict[str, Any]:
    from kernel_index.proofs.numerics import prove as verdicts

    counts: dict[str, dict[str, int]] = {}
    failures = []
    if dry:
        ops = ("fused_relu_squared",)
    for v in verdicts("cpu" if dry else "cuda", backends=(backend,), ops=ops, every=not dry):
        row = counts.setdefault(v.op, {"passed": 0, "refused": 0, "failed": 0})
        row["refused" if v.refused else "passed" if v.passes else "failed"] += 1
        if not v.passes:
            failures.append(asdict(v))
            worst = max(v.findings, key=lambda f: f.error, default=None)
            console.print(f"[red]{v.op} {v.case} {v.dtype}: {v.raised or worst}[/]", highlight=False)
    table = Table(f"op ({backend})", "passed", "refused", "failed", title="numerics against float64")
    for op, row in counts.items():
        table.add_row(op, *map(str, row.values()))
    console.print(table)
    return {"counts": counts, "failures": failures}


FA4_PROOFS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fa4-gqa64", {}),
    ("fa4-mha128", {"shape": (2, 2048, 16, 16, 128), "dtype": "float16"}),
    ("fa4-noncausal", {"shape": (2, 1024, 8, 8, 128), "causal": False}),
)


def execute_proofs() -> list[dict[str, Any]]:
    """``prove fa4`` for three calls."""
    found = []
    for name, call in FA4_PROOFS:
        proof = ki.fa4_execute_proof(**call, time_limit=120.0)
        report = proof.receipt["runs"][0]["report"] if proof.receipt["runs"] else {}
        facts = {key: report.get(key) for key in ("median_milliseconds", "numerics", "versions")}
        console.print(f"{name}: {proof.state}, {'passed' if proof.passed else proof.problems}", highlight=False)
        request = proof.receipt["request"]
        found.append({"name": name, "state": proof.state, "passed": proof.passed, "request": request, **facts})
    return found


def environment(dry: bool) -> dict[str, Any]:
    import triton

    return {
        "device": "cpu (interpreter)" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "liger_kernel": importlib.util.find_spec("liger_kernel") is not None,
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
        "date": time.strftime("%Y-%m-%d"),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json.")] = Path("runs/gpu"),
    dry_run: Annotated[bool, typer.Option(help="Small sizes through the interpreter, no GPU.")] = False,
    only: Annotated[str, typer.Option(help="Only questions whose name contains this.")] = "",
    numerics: Annotated[bool, typer.Option(help="Run the proofs first.")] = True,
    op: Annotated[list[str] | None, typer.Option(help="Prove only this public function; may be repeated.")] = None,
) -> None:
    """Prove and time every Triton kernel on this machine's GPU."""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device; --dry-run does without")
    functorch.donated_buffer = False  # a backward pass is timed again and again on one graph
    result: dict[str, Any] = {"environment": environment(dry_run)}
    console.print(result["environment"])
    if numerics:
        result["numerics"] = prove(dry_run, tuple(op) if op else None)
        if not op:
            result["large"] = [*(large(check, dry_run) for check in LARGE), large_dropout(dry_run)]
        if result["environment"]["flash_attn"] and not dry_run:
            result["numerics_fa4"] = prove(dry_run, tuple(op) if op else None, "fa4")
            if not op:
                result["fa4_execute_proofs"] = execute_proofs()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.nullcontext() if dry_run else torch.cuda.stream(torch.cuda.Stream()):
            compare(result, dry_run, [q for q in questions(dry_run) if only in q.name])
    finally:  # what was measured before an interruption is kept
        (out / "gpu.json").write_text(json.dumps(result, indent=1, default=str))


def compare(result: dict[str, Any], dry_run: bool, asked: list[Question]) -> None:
    bandwidth = copy_bandwidth(dry_run)
    result["lines"] = []
    result["copy_bytes_per_second"] = bandwidth
    console.print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    for question in asked:
        lines = measure(question, bandwidth, dry_run)
        show(question, lines)
        result["lines"] += [asdict(line) for line in lines]
        torch._dynamo.reset()


if __name__ == "__main__":
    typer.run(main)
