"""``kernel-index prove``: evidence that anyone can make again, without the hardware where that is possible."""

import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.text import Text

import kernel_index
from kernel_index.core.target import has_package
from kernel_index.core.terminal import (
    STDOUT,
    Cell,
    JsonFile,
    check_output,
    console,
    hanging,
    only_json,
    print_table,
    write_figures,
)
from kernel_index.proofs import choice, record
from kernel_index.proofs.fa4 import fa4, verify
from kernel_index.proofs.tpu_command import tpu

if TYPE_CHECKING:
    from kernel_index.proofs.numerics import Verdict

app = typer.Typer(name="prove", add_completion=False, pretty_exceptions_enable=False)

Ops = Annotated[
    list[str] | None, typer.Option("--op", help="Only this public function; may be repeated.", show_default="all")
]
Record = Annotated[
    Path | None,
    typer.Option("--record", help="Also write counts and machine, for benchmarks/results.", show_default="none"),
]


@app.callback(invoke_without_command=True)
def _group(
    context: typer.Context,
    receipt: Annotated[
        Path | None,
        typer.Option(
            "--verify",
            help="Accept or refuse a receipt of `prove fa4` or `rollout-check`.",
            exists=True,
            dir_okay=False,
            show_default="none",
        ),
    ] = None,
) -> None:
    """Proofs: numerics against float64, ahead-of-time compilation, memory traffic, FlashAttention-4 executed."""
    if receipt is not None:
        verify(receipt)
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print(context.get_help())
        raise typer.Exit(2)


app.command()(fa4)
app.command()(tpu)


@app.command()
def numerics(
    op: Ops = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; may be repeated.", show_default="all")
    ] = None,
    device: Annotated[str, typer.Option(help="The device of the inputs.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="The first case of each function only.")] = False,
    out: JsonFile = None,
    recorded: Record = None,
) -> None:
    """Every entry × backend that runs here, forward and backward, against float64 within derived budgets."""
    _check_outputs(out, recorded)
    choice.device(device)
    if device == "cpu":
        _interpret()
    ops = choice.operators(op)
    which = choice.backends(backend, ops)
    with only_json(out == STDOUT):
        _numerics(ops, which, device, quick, out, recorded)


def _numerics(
    ops: tuple[str, ...] | None,
    backends: tuple[str, ...] | None,
    device: str,
    quick: bool,
    out: Path | None,
    recorded: Path | None,
) -> None:
    from kernel_index.proofs.numerics import prove as verdicts_of

    found: dict[tuple[str, str], list[Verdict]] = {}
    for v in verdicts_of(device, backends, ops, every=not quick):
        found.setdefault((v.op, v.backend), []).append(v)
        if not v.passes:
            worst = max(v.findings, key=lambda f: f.share, default=None)
            hanging(console, "failed ", f"{v.op} {v.backend} {v.case} {v.dtype}: {v.raised or worst}", "red")
    header = ("op", "backend", "passed", "failed", "refused", "worst share of budget", "why refused")
    print_table(console, header, [_row(*place, verdicts) for place, verdicts in found.items()])
    every = [v for verdicts in found.values() for v in verdicts]
    if recorded is not None:
        record.write(recorded, "numerics", record.of_numerics(every, device), device)
    compared = any(v.findings for v in every)
    if not compared:
        console.print("nothing was compared")
    _finish(out, "numerics", [asdict(v) for v in every], compared and all(v.passes for v in every))


def _row(op: str, backend: str, verdicts: "list[Verdict]") -> tuple[str, ...]:
    run = [v for v in verdicts if not v.refused]
    reasons = Counter(v.refused for v in verdicts if v.refused)
    worst = f"{max((v.worst for v in run), default=0.0):.2f}" if run else ""
    counts = (sum(v.passes for v in run), sum(not v.passes for v in run), len(verdicts) - len(run))
    return (op, backend, *map(str, counts), worst, next(iter(reasons), ""))


@app.command()
def aot(
    op: Ops = None,
    target: Annotated[
        list[str] | None, typer.Option(help="sm80, sm90, sm100, sm120, gfx942 or gfx950.", show_default="all")
    ] = None,
    out: JsonFile = None,
    recorded: Record = None,
) -> None:
    """Compile every Triton kernel for GPUs that need not be here; spills on sm90 and sm100 fail the proof."""
    _check_outputs(out, recorded)
    if os.environ.get("TRITON_INTERPRET") == "1":  # an interpreted kernel cannot be compiled: a process of its own
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-m", "kernel_index.cli", *sys.argv[1:]], env=environment, check=False)
        raise typer.Exit(done.returncode)
    _need_triton()
    from kernel_index.proofs import aot as proof

    for name in target or ():
        choice.of_list("--target", name, proof.TARGETS)
    ops = choice.operators(op, proof.is_compiled)
    with only_json(out == STDOUT):
        found = list(proof.prove(tuple(target or proof.TARGETS), ops))
        header = ("op", "kernel", "target", "warps", "registers", "spilled bytes", "shared memory", "code", "problem")
        rows: list[list[Cell]] = []
        for c in found:
            mark = Text(c.error or ("spills" if c.spilled else ""), style="red")
            figures = (c.warps, c.registers, c.spilled, c.shared, c.bytes)
            rows.append([c.op, c.kernel.strip("_"), c.target, *map(str, figures), mark])
        print_table(console, header, rows)
        if recorded is not None:
            record.write(recorded, "aot", record.of_aot(found))
        clean = all(not c.error and not (c.spilled and c.target in ("sm90", "sm100")) for c in found)
        _finish(out, "aot", [asdict(c) for c in found], bool(found) and clean)


@app.command()
def traffic(op: Ops = None, out: JsonFile = None) -> None:
    """Bytes that each Triton kernel moves ÷ the bytes that any kernel must move, counted in the interpreter.

    Where liger_kernel is installed, its kernels for the same calls are counted too.
    """
    _check_outputs(out)
    _need_triton()
    _interpret()
    from kernel_index.proofs import peers, ratios

    ops = choice.operators(op, ratios.is_counted)
    with only_json(out == STDOUT):
        theirs = ratios.prove_peers(ops) if peers.installed() else ()
        found = [*ratios.prove(ops), *theirs]
        title = f"bfloat16, width 4096, at {ratios.AT} rows (along the line through {ratios.ROWS[:2]} rows)"
        header = ("op", "direction", "bytes ÷ compulsory", "affine", "launches", "ATen ops", "atomics")
        rows: list[list[Cell]] = []
        for r in found:
            affine = Text("yes" if r.affine else "no", style="" if r.affine else "red")
            rows.append([r.op, r.direction, f"{r.at_scale:.3f}", affine, *map(str, (r.launches, r.others, r.atomics))])
        print_table(console, header, rows, title)
        mine = [r for r in found if not r.op.startswith(peers.NAME)]
        passed = bool(mine) and all(r.affine and r.atomics == 0 for r in mine)
        _finish(out, "traffic", [asdict(r) | {"ratio": r.at_scale} for r in found], passed)


def _check_outputs(out: Path | None, recorded: Path | None = None) -> None:
    """Before the work, whose result could not be kept."""
    check_output("--json", out)
    check_output("--record", recorded)
    try:
        if recorded is not None:
            record.earlier(recorded)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _interpret() -> None:
    """Triton's interpreter, where there is no GPU; before Triton is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _need_triton() -> None:
    if not has_package("triton"):
        console.print("needs the triton package: pip install 'kernel-index[triton]'", style="red")
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
    write_figures(out, {"proof": proof, "passed": passed, "versions": versions, "rows": rows})
    console.print(Text.assemble(f"{proof}: ", ("passed", "green") if passed else ("failed", "red")))
    if not passed:
        raise typer.Exit(1)
