"""The command ``kernel-index rollout-check``."""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import kernel_index as ki
from kernel_index.core.digest import digest
from kernel_index.core.terminal import (
    STDOUT,
    JsonFile,
    check_output,
    clear_errors,
    console,
    hanging,
    log_plainly,
    only_json,
    print_table,
    write_figures,
)
from kernel_index.lm.checkpoint import CheckpointError
from kernel_index.lm.generate import load_model
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.rollout_axes import AXES, Finding
from kernel_index.lm.rollout_check import Report, check_by_letter

FAILED = 1
Compiler = Literal["inductor", "aot_eager", "eager"]
Precision = Literal["float32", "bfloat16", "autocast"]


def rollout_check_command(
    checkpoint: Annotated[Path, typer.Option(help="A run folder or one of its checkpoints.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the random sequences that are compared.")] = 256,
    dtype: Annotated[
        Precision, typer.Option(help="Of the weights; autocast keeps them in float32 and multiplies in bfloat16.")
    ] = "float32",
    compiler: Annotated[
        Compiler, typer.Option(help="Backend of torch.compile for the axis of compilation.")
    ] = "inductor",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, …")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sequences.")] = 0,
    out: JsonFile = None,
) -> None:
    """Compare the log-probabilities of training and of a rollout, bit by bit, along every axis; under
    numerics("invariant").  Exit 0: all are equal, for every letter of the pattern; 1: some are not, or are refused.
    """
    log_plainly()
    check_output("--json", out)
    place = _device(device)
    with clear_errors(CheckpointError), only_json(out == STDOUT):
        model = load_model(checkpoint).to(place)
        if dtype == "bfloat16":
            model = model.to(torch.bfloat16)
        autocast = torch.autocast(place.type, torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()
        with autocast, ki.receipts() as log:
            report = check_by_letter(model, tokens, seed=seed, compiler=compiler)
        _show(report)
        request = {"device": _name_of(place), "tokens": tokens, "dtype": dtype, "seed": seed, "compiler": compiler}
        write_figures(out, receipt(model, report, request, log.versions))
    if not report.is_exact:
        raise typer.Exit(FAILED)


def _device(name: str) -> torch.device:
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # an unknown word, or a PyTorch without CUDA
        line = str(error).strip().split("\n")[0]
        message = f"must be a device of this machine, got {name!r}: {line}"
        raise typer.BadParameter(message, param_hint="--device") from error
    return found


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def receipt(model: LanguageModel, report: Report, request: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """What ``kernel-index prove --verify`` accepts or refuses."""
    content = {
        "proof": "rollout-check",
        "exact": report.is_exact,
        "request": request,
        "model": model.config.to_json(),
        "machine": {"isa": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()} | versions,
        "recipes": report.recipes,
        "findings": {name: {a: asdict(f) for a, f in axes.items()} for name, axes in report.findings.items()},
    }
    return content | {"digest": digest(content)}


def _show(report: Report) -> None:
    notes = report.refusals()
    header = ("axis", *report.findings)
    rows = [(axis, *(_cell(axes[axis], notes) for axes in report.findings.values())) for axis in AXES]
    print_table(console, header, rows, "Largest |Δ log-probability| (values with other bits)")
    for number, note in enumerate(notes, 1):
        hanging(console, f"({number}) ", note)
    compared = sum(f.compared for axes in report.findings.values() for f in axes.values())
    verdict = "all bits are equal" if report.is_exact else "training and rollout do not have the same bits everywhere"
    console.print(f"{compared:,} values compared: {verdict}.")


def _cell(finding: Finding, notes: list[str]) -> str:
    if finding.refused:
        return f"refused ({notes.index(finding.refused) + 1})"
    return "0" if finding.is_exact else f"{finding.largest:.3g} ({finding.differing:,} of {finding.compared:,})"
