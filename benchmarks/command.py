"""``make bench``, ``python -m benchmarks``: the questions of this folder, each kernel proved before it is timed."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.figures import change, collect, saved, show
from benchmarks.figures.saved import Figures

REFUSED, MISUSED = 1, 2
console = Console(width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="Questions; all of them by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each contender.")] = 9,
    verify: Annotated[bool, typer.Option(help="Prove the kernels against float64 before timing them.")] = True,
    load: Annotated[Path | None, typer.Option(help="Measure nothing: take the figures of this file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write them as a table.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write them as a plot, SVG or PNG.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="Ratios between two saved files.")
    ] = None,
) -> None:
    """Compare the kernels with what a user would take instead, side by side in one process.

    A question whose kernels fail their proof is not timed.  The command then ends with status 1, and so it does when
    --compare finds that something became slower.
    """
    for name in names or ():
        if name not in collect.NAMES:
            _misused(f"NAME must be one of {', '.join(collect.NAMES)}, got {name!r}")
    if (compare or load) and (names or save):
        _misused("--compare and --load measure nothing: they take neither a NAME nor --save")
    if save and not verify:
        _misused("--save keeps only figures of kernels that passed their proof: leave --no-verify out")
    if plot and plot.suffix not in (".svg", ".png"):
        _misused(f"--plot must be a file that ends in .svg or .png, got {plot}")
    if compare:
        _compare(*map(_load, compare))
        return
    figures, refused = (_load(load), []) if load else collect.collect(names or collect.NAMES, rounds, verify)
    for comparison in figures.comparisons if load else ():
        comparison.show()
    for name, reason in figures.peers.items():
        console.print(f"{name}: {reason}", highlight=False)
    if save:
        saved.save(figures, save)
    if markdown:
        markdown.write_text(show.markdown(figures))
    if plot:
        show.plot(figures, plot)
    for line in refused:
        errors.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if refused:
        raise typer.Exit(REFUSED)


def _load(path: Path) -> Figures:
    try:
        return saved.load(path)
    except ValueError as error:
        _misused(str(error))


def _compare(old: Figures, new: Figures) -> None:
    found = change.changes(old, new)
    table = Table("question", "contender", "what", "old", "new", "new ÷ old")
    for c in found:
        scale = 2**20 if c.what == "memory" else 1
        unit = " MiB" if c.what == "memory" else ""
        values = (f"{v / scale:,.2f}{unit}" for v in (c.old, c.new))
        table.add_row(c.title, c.contender, c.what, *values, f"{c.growth:.2f}")
    console.print(table)
    for name in sorted({k for f in (old, new) for k in f.machine}):
        a, b = old.machine.get(name), new.machine.get(name)
        if a != b:
            console.print(f"{name}: {a} in the old file, {b} in the new one", markup=False, highlight=False)
    for line in change.missing(old, new):
        console.print(line, markup=False, highlight=False)
    worse = change.regressions(found)
    for line in worse:
        console.print(f"regression: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if not found:
        _misused("OLD and NEW must share a question, and share none")
    if worse:
        raise typer.Exit(REFUSED)
    console.print("no regression")


def _misused(message: str) -> NoReturn:
    errors.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(MISUSED)
