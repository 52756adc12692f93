"""``kernel-index prove``: evidence that anyone can make again, without the hardware where that is possible."""

import itertools
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import kernel_index
from kernel_index.core.atomic_write import write_whole
from kernel_index.core.target import has_package
from kernel_index.proofs import choice, record
from kernel_index.proofs.fa4 import fa4, verify
from kernel_index.proofs.tpu_command import tpu

console = Console(width=None if sys.stdout.isatty() else 160)
app = typer.Typer(name="prove", add_completion=False, pretty_exceptions_enable=False)

Ops = Annotated[list[str] | None, typer.Option("--op", help="Only this public function; may be repeated.")]
Out = Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")]
Record = Annotated[Path | None, typer.Option("--record", help="Also write counts and machine, for benchmarks/results.")]


@app.callback(invoke_without_command=True)
def _group(
    context: typer.Context,
    receipt: Annotated[
        Path | None,
        typer.Option("--verify", help="Accept or refuse a receipt of `prove fa4`.", exists=True, dir_okay=False),
    ] = None,
) -> None:
    """Proofs: numerics against float64, ahead-of-time compilation, memory traffic, FlashAttention-4 executed."""
    if receipt is not None:
        verify(receipt)
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print(context.get_help(), markup=False, highlight=False)
        raise typer.Exit(2)


app.command()(fa4)
app.command()(tpu)


@app.command()
def numerics(
    op: Ops = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this backend; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="The device of the inputs.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="The first case of each function only.")] = False,
    out: Out = None,
    recorded: Record = None,
) -> None:
    """Every entry × backend that runs here, forward and backward, against float64 within derived budgets."""
    _check_record(recorded)
    choice.device(device)
    if device == "cpu":
        _interpret()
    from kernel_index.proofs.numerics import Verdict
    from kernel_index.proofs.numerics import prove as verdicts

    ops = choice.operators(op)
    rows: dict[tuple[str, str], list[Verdict]] = {}
    for v in verdicts(device, choice.backends(backend, ops), ops, every=not quick):
        rows.setdefault((v.op, v.backend), []).append(v)
        if not v.passes:
            worst = max(v.findings, key=lambda f: f.error, default=None)
            console.print(f"[red]failed[/] {v.op} {v.backend} {v.case} {v.dtype}: {v.raised or worst}", highlight=False)
    table = Table("op", "backend", "passed", "failed", "refused", "worst share of budget", "why refused")
    for (name, which), found in rows.items():
        run = [v for v in found if not v.refused]
        reasons = Counter(v.refused for v in found if v.refused)
        worst = f"{max((v.worst for v in run), default=0.0):.2f}" if run else ""
        counts = (sum(v.passes for v in run), sum(not v.passes for v in run), len(found) - len(run))
        table.add_row(name, which, *map(str, counts), worst, next(iter(reasons), ""))
    console.print(table)
    every = [v for found in rows.values() for v in found]
    if recorded is not None:
        record.write(recorded, "numerics", record.of_numerics(every, device), device)
    compared = any(v.findings for v in every)
    if not compared:
        console.print("nothing was compared", highlight=False)
    _finish(out, "numerics", [asdict(v) for v in every], compared and all(v.passes for v in every))


@app.command()
def aot(
    op: Ops = None,
    target: Annotated[list[str] | None, typer.Option(help="sm80, sm90, sm100, sm120, gfx942, gfx950.")] = None,
    out: Out = None,
    recorded: Record = None,
) -> None:
    """Compile every Triton kernel for GPUs that need not be here; spills on sm90 and sm100 fail the proof."""
    _check_record(recorded)
    if os.environ.get("TRITON_INTERPRET") == "1":  # an interpreted kernel cannot be compiled: a process of its own
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-m", "kernel_index.cli", *sys.argv[1:]], env=environment, check=False)
        raise typer.Exit(done.returncode)
    _need_triton()
    from kernel_index.proofs import aot as proof

    for name in target or ():
        choice.of_list("--target", name, proof.TARGETS)
    found = []
    table = Table("op", "kernel", "target", "warps", "registers", "spilled bytes", "shared memory", "code", "")
    for c in proof.prove(tuple(target or proof.TARGETS), choice.operators(op, proof.is_compiled)):
        found.append(c)
        mark = f"[red]{c.error}[/]" if c.error else "[red]spills[/]" if c.spilled else ""
        figures = (c.warps, c.registers, c.spilled, c.shared, c.bytes)
        table.add_row(c.op, c.kernel.strip("_"), c.target, *map(str, figures), mark)
    console.print(table)
    if recorded is not None:
        record.write(recorded, "aot", record.of_aot(found))
    clean = all(not c.error and not (c.spilled and c.target in ("sm90", "sm100")) for c in found)
    _finish(out, "aot", [asdict(c) for c in found], bool(found) and clean)


@app.command()
def traffic(op: Ops = None, out: Out = None) -> None:
    """Bytes that each Triton kernel moves ÷ the bytes that any kernel must move, counted in the interpreter.

    Where liger_kernel is installed, its kernels for the same calls are counted too.
    """
    _need_triton()
    _interpret()
    from kernel_index.proofs import peers, ratios

    ops = choice.operators(op, ratios.is_counted)
    found = []
    title = f"bfloat16, width 4096, at {ratios.AT} rows (along the line through {ratios.ROWS[:2]} rows)"
    table = Table("op", "direction", "bytes ÷ compulsory", "affine", "launches", "ATen ops", "atomics", title=title)
    ours = ratios.prove(ops)
    theirs = ratios.prove_peers(ops) if peers.installed() else ()
    for r in itertools.chain(ours, theirs):
        found.append(r)
        counts = map(str, (r.launches, r.others, r.atomics))
        table.add_row(r.op, r.direction, f"{r.at_scale:.3f}", "yes" if r.affine else "[red]no[/]", *counts)
    console.print(table)
    rows = [asdict(r) | {"ratio": r.at_scale} for r in found]
    mine = [r for r in found if not r.op.startswith(peers.NAME)]
    _finish(out, "traffic", rows, bool(mine) and all(r.affine and r.atomics == 0 for r in mine))


def _check_record(path: Path | None) -> None:
    """Before the work, whose result could not be kept."""
    try:
        if path is not None:
            record.earlier(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _interpret() -> None:
    """Triton's interpreter, where there is no GPU; before Triton is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _need_triton() -> None:
    if not has_package("triton"):
        console.print("[red]needs the triton package: pip install 'kernel-index\\[triton]'[/]")
        raise typer.Exit(2)


def _finish(out: Path | None, proof: str, rows: list[dict[str, Any]], passed: bool) -> None:
    versions: dict[str, Any] = {
        "kernel-index": kernel_index.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if has_package("triton"):
        import triton

        versions["triton"] = triton.__version__
    if out is not None:
        content = {"proof": proof, "passed": passed, "versions": versions, "rows": rows}
        write_whole(out, json.dumps(content, indent=1, default=str))
        console.print(f"wrote {out}", highlight=False)
    console.print(f"{proof}: {'[green]passed' if passed else '[red]failed'}[/]")
    if not passed:
        raise typer.Exit(1)
