"""The report of a run: the table of receipts, the loss curve and ``report.html``."""

import io
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
from matplotlib.figure import Figure

import kernel_index as ki
from kernel_index.lm.train import StepReport, Trainer

LN2 = 0.6931471805599453


FIRST = "first choice"


class ReceiptRow(NamedTuple):
    """One line of the receipts table."""

    op: str
    backend: str
    count: int
    reason: str


def receipt_rows(receipts: Counter[ki.Receipt]) -> list[ReceiptRow]:
    """Op × backend × count × reason, by op; the reason is why each earlier backend did not run.

    An op that ran as a phase of another op has a line of its own, taken from that op's receipt.
    """
    merged: Counter[tuple[str, str, str]] = Counter()
    for receipt, count in receipts.items():
        for op, backend, reason in _phases(receipt):
            merged[op, backend, reason] += count
        reasons = [f"{name}: {rule}" for name, rule in receipt.declined]
        if receipt.forced_by:
            reasons.insert(0, f"forced by {receipt.forced_by}")
        if receipt.error:
            reasons.append(f"{receipt.tried} failed: {receipt.error}")
        merged[receipt.op, receipt.ran or "nothing", "; ".join(reasons) or FIRST] += count
    return [ReceiptRow(op, ran, count, reason) for (op, ran, reason), count in sorted(merged.items())]


REPEATED = 3
"""A reason that so many rows share is a note below the table."""


def with_notes(rows: list[ReceiptRow]) -> tuple[list[ReceiptRow], list[str]]:
    """The rows with numbers for the reasons that many of them share, and these reasons in the order of the numbers."""
    counts = Counter(reason for row in rows for reason in row.reason.split("; "))
    notes = [reason for reason, count in counts.items() if count >= REPEATED and reason != FIRST]
    numbers = {reason: f"({n})" for n, reason in enumerate(notes, 1)}
    short = [row._replace(reason=" ".join(numbers.get(r, f"{r};") for r in row.reason.split("; "))) for row in rows]
    return [row._replace(reason=row.reason.removesuffix(";")) for row in short], notes


def _phases(receipt: ki.Receipt) -> Iterator[tuple[str, str, str]]:
    """The ops that this op called as its phases, from its receipt's details."""
    scoring = str(receipt.details.get("scoring_backend"))
    if scoring.startswith("hierarchical"):
        by = "native" if scoring.endswith("native") else "torch"
        yield "hierarchical_block_select", by, f"phase 1 of {receipt.op}"
    if "mean_union_over_picks" in receipt.details:
        yield "union_selection", str(receipt.details["union_backend"]), f"phase 2 of {receipt.op}"


def loss_curve(metrics: list[StepReport], unigram: float) -> str:
    """An SVG of bits per byte over steps."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([m.step for m in metrics], [m.loss / LN2 for m in metrics], linewidth=1, alpha=0.6, label="training")
    measured = [(m.step, m.validation) for m in metrics if m.validation is not None]
    axes.plot([s for s, _ in measured], [v for _, v in measured], marker="o", label="validation (held out)")
    axes.axhline(unigram, linestyle="--", color="grey", label="unigram baseline")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def against_baseline(bits: float, unigram: float) -> str:
    """How far the validation is from the baseline without a model."""
    share = 100 * (1 - bits / unigram)
    return f"{abs(share):.0f} % {'below' if share >= 0 else 'above'} it"


def write_report(trainer: Trainer, metrics: list[StepReport], sample: str) -> Path:
    """Write ``report.html`` into the run folder: one file that loads nothing from elsewhere."""
    rows, notes = with_notes(receipt_rows(trainer.receipts))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        config=trainer.config,
        parameters=trainer.model.parameter_count(),
        flops=trainer.flops_per_step,
        metrics=metrics,
        last=metrics[-1],
        against_baseline=against_baseline,
        unigram=trainer.unigram,
        curve=loss_curve(metrics, trainer.unigram),
        receipts=rows,
        notes=notes,
        sample=sample,
        facts=machine_facts(),
    )
    path = trainer.folder / "report.html"
    draft = path.with_suffix(".draft")
    draft.write_text(page, encoding="utf-8", errors="replace")
    draft.replace(path)
    return path


def machine_facts() -> Iterable[tuple[str, str]]:
    return (
        ("kernel_index", ki.__version__),
        ("PyTorch", torch.__version__),
        ("Python", platform.python_version()),
        ("processor", platform.processor() or platform.machine()),
        ("threads", str(torch.get_num_threads())),
    )
