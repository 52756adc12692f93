"""The commands ``kernel-index train``, ``generate`` and ``presets``."""

import contextlib
import itertools
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

import kernel_index as ki
from kernel_index.lm.checkpoint import CheckpointError
from kernel_index.lm.config import PRESETS
from kernel_index.lm.data import DataError
from kernel_index.lm.distributed import processes
from kernel_index.lm.generate import generate, load_model
from kernel_index.lm.model import LanguageModel, active_parameters, flops_per_token
from kernel_index.lm.report import LN2, against_baseline, receipt_rows, with_notes, write_report
from kernel_index.lm.train import (
    RunConfig,
    StepReport,
    Trainer,
    TrainingError,
    forced_backend,
    read_config,
    read_metrics,
)

INTERRUPTED = 130
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 240

console = Console()
errors = Console(stderr=True)


def train_command(
    preset: Annotated[
        str | None, typer.Option(help=f"Model and schedule: {', '.join(PRESETS)}.", show_default="tiny")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default="the preset's")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="a new folder under runs/")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default="100")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out (or the newest run).")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order and dropout.", show_default="0")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of text, or one file.", show_default="Python's standard library")
    ] = None,
    glob: Annotated[
        str | None, typer.Option(help="Files of the folder.", show_default="all text; **/*.py without --data")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast).", show_default="float32")] = None,
    sparse_from_step: Annotated[
        int | None, typer.Option(min=0, help="S blocks attend to everything before this step.", show_default="0")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="reference runs the plain formulas.", show_default="auto")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile", help="Put the whole model through torch.compile.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NAME=VALUE of RunConfig, as accumulate=2, recompute=true, batch_rows=8; repeatable."
        ),
    ] = None,
) -> None:
    """Train a small language model on real text with the kernels of the index."""
    own: dict[str, Any] = {"preset": preset, "steps": steps, "checkpoint_every": checkpoint_every, "seed": seed}
    own |= {"data": data and str(data.resolve()), "glob": glob, "dtype": dtype, "backend": backend}
    own |= {"compile": compiled, "sparse_from_step": sparse_from_step}
    with _clear_errors():
        own = _merged(own, RunConfig.read_settings(settings or ()))
        if resume:
            folder = out or _newest_run()
            longer = {name: own.pop(name) for name in ("steps", "checkpoint_every")}
            _refuse_changes(folder, own)
            trainer = Trainer.resume(folder, **longer)
            console.print(f"Resuming {folder} after step {trainer.step} of {trainer.config.steps}.", highlight=False)
        else:
            name = own.pop("preset") or "tiny"
            config = RunConfig.from_preset(name, **own)
            if out is None and processes() > 1:
                raise ValueError("--out must be given where several processes train, got none")
            folder = out or _fresh_folder(name)
            trainer = Trainer.start(config, folder)
        if trainer.group.rank:  # only the first process prints
            console.quiet = True
        _introduce(trainer)
        finished = _run(trainer)
        if trainer.group.size == 1:
            _conclude(trainer, finished)
    if not finished:
        raise typer.Exit(INTERRUPTED)


def generate_command(
    checkpoint: Annotated[Path, typer.Option(help="A run folder or one of its checkpoints.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = SAMPLE_PROMPT,
    tokens: Annotated[int, typer.Option(min=0, help="Bytes to generate at most.")] = SAMPLE_TOKENS,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely byte.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Sample among this many most likely bytes.")] = 40,
    top_p: Annotated[
        float, typer.Option(help="Sample among the most likely bytes that hold this share of the probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt with a trained model."""
    with _clear_errors():
        model = load_model(checkpoint)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        texts = generate(model, prompt, tokens, **options)
        for text in itertools.chain([prompt], texts):  # after the options were checked
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")


def presets_command() -> None:
    """The presets of `train --preset`: blocks, parameters, and the FLOPs of a training step."""
    columns = []
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = LanguageModel(preset.model)
        flops = flops_per_token(preset.model)
        tokens = preset.batch_rows * preset.accumulate * preset.model.context
        sizes = (f"{model.parameter_count():,}", f"{active_parameters(model):,}")
        work = (f"{flops / 1e6:,.1f}", f"{flops * tokens / 1e9:,.1f}")
        columns.append((name, preset.model.pattern, *sizes, *work, preset.dtype, preset.about))
    facts = ("preset", "blocks", "parameters", "of a token", "MFLOP a token", "GFLOP a step", "trains in", "trains on")
    rows = list(zip(facts, *columns, strict=True))  # a column for each preset: 80 characters hold them
    table = Table(*(Column(name, overflow="fold") for name in rows[0]))
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Print an expected error as one line, without a traceback; exit with 2 for wrong use and with 1 for the rest."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(
        console=errors, show_time=False, show_level=False, show_path=False)])  # fmt: skip
    try:
        yield
    except (CheckpointError, DataError, TrainingError, ValueError, OSError) as error:
        errors.print(f"[bold red]error:[/] {error}", highlight=False)
        wrong_use = isinstance(error, ValueError) and not isinstance(error, CheckpointError)
        raise typer.Exit(2 if wrong_use else 1) from error


def _fresh_folder(name: str) -> Path:
    numbers = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(folder for folder in numbers if not folder.exists())


def _newest_run() -> Path:
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise CheckpointError("there is no run to resume under runs/: name one with --out")
    return runs[-1].parent


def _merged(options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Options and the values of ``--set``; none may be given twice."""
    for name, value in settings.items():
        if options.get(name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"--set {name} must not repeat {option}, got {value!r} beside {options[name]!r}")
    return options | settings


def _refuse_changes(folder: Path, given: Mapping[str, object]) -> None:
    config = read_config(folder)
    for name, value in given.items():
        if value is not None and value != getattr(config, name):
            raise ValueError(
                f"--{name.replace('_', '-')} must stay {getattr(config, name)!r} when the run is resumed, got {value!r}"
            )


def _introduce(trainer: Trainer) -> None:
    c = trainer.config
    rows = c.batch_rows * c.accumulate
    active = active_parameters(trainer.model)
    of_a_token = "" if active == trainer.parameters else f" ({active:,} for one token)"
    console.print(
        f"[bold]{c.preset}[/]: {trainer.parameters:,} parameters{of_a_token}, blocks {c.model.pattern}, "
        f"{_rounded(trainer.flops_per_step / 1e9)} GFLOP per step of {rows} × {c.model.context} tokens, {c.dtype}",
        highlight=False,
    )
    source = c.data or "Python's standard library"
    console.print(f"Data: {source}, {len(trainer.rows):,} packed rows; run folder: {trainer.folder}", highlight=False)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _run(trainer: Trainer) -> bool:
    """Train with a progress bar; returns False after Ctrl-C, with the state saved."""
    stop: list[int] = []

    def on_signal(number, _frame):
        if stop:  # a second Ctrl-C stops at once
            raise KeyboardInterrupt
        stop.append(number)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("training", total=trainer.config.steps, completed=trainer.step, status="compiling")
            for report in trainer.steps():
                progress.update(task, completed=report.step, status=_status(report))
                _print_line(report, trainer.config)
                if trainer.group.sum(len(stop)):  # all processes stop after the same step
                    break
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if trainer.step < trainer.config.steps:
        saved = trainer.save()
        console.print(f"Interrupted after step {trainer.step}; saved {saved}.", highlight=False)
        console.print(f"Continue with: kernel-index train --resume --out {trainer.folder}", highlight=False)
        return False
    return True


def _status(report: StepReport) -> str:
    return f"loss {report.loss:.3f} ({report.loss / LN2:.2f} bits/byte), {report.tokens / report.seconds:,.0f} tokens/s"


def _print_line(report: StepReport, config: RunConfig) -> None:
    """Print every validation; without a terminal also one line for each twentieth of the run."""
    if report.validation is not None:
        console.print(f"step {report.step:>5}: validation {report.validation:.3f} bits per byte", highlight=False)
    if not console.is_terminal and (report.step == 1 or report.step % max(1, config.steps // 20) == 0):
        left = (config.steps - report.step) * report.seconds
        console.print(f"step {report.step:>5}/{config.steps}: {_status(report)}, ETA {left:,.0f} s", highlight=False)


def _sample_prompt(trainer: Trainer) -> str:
    """How the training text begins; ``def `` where that is Python's standard library."""
    if trainer.config.data is None:
        return SAMPLE_PROMPT
    return bytes(trainer.rows.documents[0][1:9].astype("uint8")).decode(errors="ignore")


def _conclude(trainer: Trainer, finished: bool) -> None:
    metrics = read_metrics(trainer.folder)
    if not metrics:
        return
    sample = ""
    if finished:
        trainer.model.eval()
        with ki.receipts() as log, forced_backend(trainer.config.backend):
            prompt = _sample_prompt(trainer)
            sample = prompt + "".join(generate(trainer.model, prompt, SAMPLE_TOKENS))
        trainer.receipts += log.counts()
    table = Table("op", "backend", "calls", "why not an earlier backend", title="Which kernels ran")
    rows, notes = with_notes(receipt_rows(trainer.receipts))
    for row in rows:
        table.add_row(row.op, row.backend, f"{row.count:,}", row.reason)
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", markup=False, highlight=False)
    console.print(f"{str(trainer.goodput).capitalize()}.", highlight=False)
    if finished:
        console.print("[bold]Generated:[/]")
        console.print(sample, markup=False, highlight=False)
        last = metrics[-1].validation
        if last is not None:
            console.print(
                f"\nValidation: [bold]{last:.3f} bits per byte[/], unigram baseline {trainer.unigram:.3f}: "
                f"{against_baseline(last, trainer.unigram)}.",
                highlight=False,
            )
    console.print(f"Report: {write_report(trainer, metrics, sample)}", highlight=False)
