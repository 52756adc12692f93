"""The commands ``kernel-index train``, ``generate`` and ``presets``."""

import itertools
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

import kernel_index as ki
from kernel_index.core.terminal import (
    Json,
    clear_errors,
    console,
    hanging,
    log_plainly,
    only_json,
    print_json,
    print_table,
)
from kernel_index.lm import train_options
from kernel_index.lm.checkpoint import CheckpointError
from kernel_index.lm.config import PRESETS, Preset
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
    read_metrics,
)
from kernel_index.lm.train_options import TrainOptions

INTERRUPTED = 130
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 240


train = typer.Typer(add_completion=False)


@train.command(
    "train",  # tyro reads the options
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train_command(context: typer.Context) -> None:
    """Train a small language model on real text with the kernels of the index."""
    log_plainly()
    with clear_errors(CheckpointError, TrainingError):
        options = train_options.read(context.args)
        with only_json(options.json):
            finished = _train(options)
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _train(options: TrainOptions) -> bool:
    """Train, print, and return whether the run came to its end."""
    config = options.run
    if options.resume:
        folder = options.out or train_options.newest_run()
        trainer = Trainer.resume(folder, steps=config.steps, checkpoint_every=config.checkpoint_every)
        console.print(f"Resuming {folder} after step {trainer.step} of {trainer.config.steps}.", soft_wrap=True)
    else:
        if options.out is None and processes() > 1:
            raise ValueError("--out must be given where several processes train, got none")
        trainer = Trainer.start(config, options.out or _fresh_folder(config.preset))
    if trainer.group.rank:  # only the first process prints
        console.quiet = True
    _introduce(trainer)
    finished = _run(trainer)
    if trainer.group.size == 1:
        result = _conclude(trainer, finished)
        if options.json:
            print_json(result)
    return finished


def generate_command(
    checkpoint: Annotated[Path, typer.Option(help="A run folder or one of its checkpoints.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = SAMPLE_PROMPT,
    tokens: Annotated[int, typer.Option(min=0, help="Bytes to generate at most.")] = SAMPLE_TOKENS,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely byte.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Sample among this many most likely bytes.")] = 40,
    top_p: Annotated[
        float,
        typer.Option(max=1.0, help="Sample among the most likely bytes that hold this share of the probability."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt with a trained model."""
    log_plainly()
    with clear_errors(CheckpointError):
        model = load_model(checkpoint)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        texts = generate(model, prompt, tokens, **options)
        for text in itertools.chain([prompt], texts):  # after the options were checked
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")


def presets_command(as_json: Json = False) -> None:
    """The presets of `train --preset`: blocks, parameters, and the FLOPs of a training step."""
    facts = {name: _facts(preset) for name, preset in PRESETS.items()}
    if as_json:
        print_json([{"preset": name} | found for name, found in facts.items()])
        return
    rows = []
    for name, found in facts.items():
        counts = (f"{found[fact]:,}" for fact in ("parameters", "parameters of a token"))
        work = (f"{found['FLOPs of a token'] / 1e6:,.1f}", f"{found['FLOPs of a step'] / 1e9:,.1f}")
        rows.append((name, found["blocks"], *counts, *work, found["trains in"], found["trains on"]))
    header = ("preset", "blocks", "parameters", "of a token", "MFLOP a token", "GFLOP a step", "trains in", "trains on")
    print_table(console, header, rows, turned=True)


def _facts(preset: Preset) -> dict[str, Any]:
    with torch.device("meta"):
        model = LanguageModel(preset.model)
    flops = int(flops_per_token(preset.model))
    return {
        "blocks": preset.model.pattern,
        "parameters": model.parameter_count(),
        "parameters of a token": active_parameters(model),
        "FLOPs of a token": flops,
        "FLOPs of a step": flops * preset.batch_rows * preset.accumulate * preset.model.context,
        "trains in": preset.dtype,
        "trains on": preset.about,
    }


def _fresh_folder(name: str) -> Path:
    numbers = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(folder for folder in numbers if not folder.exists())


def _introduce(trainer: Trainer) -> None:
    c = trainer.config
    rows = c.batch_rows * c.accumulate
    active = active_parameters(trainer.model)
    of_a_token = "" if active == trainer.parameters else f" ({active:,} for one token)"
    console.print(
        Text.assemble(
            (c.preset, "bold"),
            f": {trainer.parameters:,} parameters{of_a_token}, blocks {c.model.pattern}, "
            f"{_rounded(trainer.flops_per_step / 1e9)} GFLOP per step of {rows} × {c.model.context} tokens, {c.dtype}",
        )
    )
    source = c.data or "Python's standard library"
    console.print(f"Data: {source}, {len(trainer.rows):,} packed rows; run folder: {trainer.folder}", soft_wrap=True)


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
        console.print(f"Interrupted after step {trainer.step}; saved {saved}.", soft_wrap=True)
        console.print(
            f"Continue with: kernel-index train --resume --out {shlex.quote(str(trainer.folder))}", soft_wrap=True
        )
        return False
    return True


def _status(report: StepReport) -> str:
    return f"loss {report.loss:.3f} ({report.loss / LN2:.2f} bits/byte), {report.tokens / report.seconds:,.0f} tokens/s"


def _print_line(report: StepReport, config: RunConfig) -> None:
    """Print every validation; without a terminal also one line for each twentieth of the run."""
    if report.validation is not None:
        console.print(f"step {report.step:>5}: validation {report.validation:.3f} bits per byte")
    if not console.is_terminal and (report.step == 1 or report.step % max(1, config.steps // 20) == 0):
        left = (config.steps - report.step) * report.seconds
        console.print(f"step {report.step:>5}/{config.steps}: {_status(report)}, ETA {left:,.0f} s")


def _sample_prompt(trainer: Trainer) -> str:
    """How the training text begins; ``def `` where that is Python's standard library."""
    if trainer.config.data is None:
        return SAMPLE_PROMPT
    return bytes(trainer.rows.documents[0][1:9].astype("uint8")).decode(errors="ignore")


def _conclude(trainer: Trainer, finished: bool) -> dict[str, Any]:
    """Print what the run has come to, write its report, and return both as values."""
    metrics = read_metrics(trainer.folder)
    found: dict[str, Any] = {"folder": str(trainer.folder), "finished": finished, "step": trainer.step}
    if not metrics:
        return found
    sample = _sample(trainer) if finished else ""
    rows, notes = with_notes(receipt_rows(trainer.receipts))
    header = ("op", "backend", "calls", "why not an earlier backend")
    print_table(console, header, [(r.op, r.backend, f"{r.count:,}", r.reason) for r in rows], "Which kernels ran")
    for number, note in enumerate(notes, 1):
        hanging(console, f"({number}) ", note)
    console.print(f"{str(trainer.goodput).capitalize()}.")
    last = metrics[-1].validation
    if finished:
        console.print("Generated:", style="bold")
        console.print(sample)
    if finished and last is not None:
        console.print(
            Text.assemble(
                "\nValidation: ",
                (f"{last:.3f} bits per byte", "bold"),
                f", unigram baseline {trainer.unigram:.3f}: {against_baseline(last, trainer.unigram)}.",
            )
        )
    report = write_report(trainer, metrics, sample)
    console.print(f"Report: {report}", soft_wrap=True)
    return found | {
        "loss_nats": metrics[-1].loss,
        "validation_bits_per_byte": last,
        "unigram_bits_per_byte": trainer.unigram,
        "kernels": [r._asdict() for r in receipt_rows(trainer.receipts)],
        "shares_of_time": trainer.goodput.shares(),
        "sample": sample,
        "report": str(report),
    }


def _sample(trainer: Trainer) -> str:
    """What the trained model writes; its receipts join those of the run."""
    trainer.model.eval()
    with ki.receipts() as log, forced_backend(trainer.config.backend):
        prompt = _sample_prompt(trainer)
        sample = prompt + "".join(generate(trainer.model, prompt, SAMPLE_TOKENS))
    trainer.receipts += log.counts()
    return sample
