"""What commands print: tables that fit the terminal, and an expected error as one line.  Needs the ``cli`` extra."""

import codecs
import contextlib
import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table
from rich.text import Text

from kernel_index.core.atomic_write import write_whole

WRONG_USE = 2
"""Exit status of wrong use, whatever the command."""

PIPED = 120
"""Columns where the output is no terminal and COLUMNS is not set."""

LEAST = 20
"""Columns that text has beside its label, however narrow the terminal is."""

STDOUT = Path("-")

PLAIN: Any = {"markup": False, "emoji": False, "highlight": False}
"""What commands print is text: a folder may be called ``[red]`` or ``:cat:``.  Style is an argument, or ``Text``."""


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


console = Console(width=None if _is_terminal(sys.stdout) or os.environ.get("COLUMNS") else PIPED, **PLAIN)
errors = Console(stderr=True, **PLAIN)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.", show_default="off")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the figures as JSON; - prints them and nothing else.", show_default="none"),
]

Cell = str | Text


def print_json(content: Any) -> None:
    """In UTF-8; in ASCII where the stream has another encoding, or a file's name is not UTF-8."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    if not _is_utf8(sys.stdout) or text != text.encode(errors="replace").decode():
        text = json.dumps(content, indent=2, default=str)
    sys.stdout.write(text + "\n")


def _is_utf8(stream: TextIO) -> bool:
    return codecs.lookup(stream.encoding or "utf-8").name == "utf-8"


def print_table(
    to: Console, header: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "", *, turned: bool = False
) -> None:
    """A table, or one paragraph for each row where the terminal is too narrow for whole words in the columns.

    ``turned``: the table has a column for each row.
    """
    shown = list(zip(header, *rows, strict=True)) if turned else [header, *rows]
    widths = _widths(shown, to.width)
    if widths:
        columns = (Column(Text(str(name)), width=width) for name, width in zip(shown[0], widths, strict=True))
        table = Table(*columns, title=Text(title) if title else None)
        for row in shown[1:]:
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        to.print(table)
        return
    if title:
        hanging(to, "", title)
    label = max(map(len, header))
    for row in rows:
        to.print()
        for name, cell in zip(header, row, strict=True):
            if str(cell):
                hanging(to, f"{name:<{label}}  ", cell)


def _widths(rows: Sequence[Sequence[Cell]], width: int) -> list[int]:
    """Of the columns, so that no word is broken; empty if the terminal is too narrow."""
    columns = list(zip(*rows, strict=True))
    found = [max(map(_longest_word, column)) for column in columns]
    whole = [max(cell_len(str(cell)) for cell in column) for column in columns]
    free = width - 1 - sum(found) - 3 * len(found)  # bars, and a space on both sides of a cell
    if free < 0:
        return []
    while free and found != whole:  # to the column that lacks most
        neediest = max(range(len(found)), key=lambda i: whole[i] - found[i])
        found[neediest] += 1
        free -= 1
    return found


def _longest_word(cell: Cell) -> int:
    return max(map(cell_len, str(cell).split()), default=0)


def hanging(to: Console, label: str, text: Cell, style: str = "") -> None:
    """Text beside a label.  Lines break between words, never in a word, and continue below the text."""
    style = style or (str(text.style) if isinstance(text, Text) else "")
    for line in str(text).splitlines() or [""]:
        broken = textwrap.wrap(
            line, max(LEAST, to.width - len(label)), break_long_words=False, break_on_hyphens=False
        )  # fmt: skip
        for part in broken or [""]:
            whole = Text.assemble(label, (part.replace("\N{NO-BREAK SPACE}", " "), style))
            whole.rstrip()
            to.print(whole, soft_wrap=True)
            label = " " * len(label)


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Print to the standard error what a command says beside its JSON."""
    before = console.stderr
    console.stderr = before or wanted
    try:
        yield
    finally:
        console.stderr = before


def check_output(option: str, path: Path | None) -> None:
    """Before the work, whose result could not be kept.  Raises ``BadParameter``, which is wrong use."""
    if path is None or path == STDOUT:
        return
    folder = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"{option} must be a file that can be written, got {path}")


def write_figures(out: Path | None, content: dict[str, Any]) -> None:
    """What ``JsonFile`` asked for."""
    if out == STDOUT:
        print_json(content)
    elif out is not None:
        with clear_errors():
            write_whole(out, json.dumps(content, indent=1, default=str))
        console.print(f"wrote {out}", soft_wrap=True)


def log_plainly() -> None:
    """Warnings of the log as plain lines on the standard error."""
    handler = RichHandler(console=errors, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


@contextlib.contextmanager
def clear_errors(*faults: type[Exception]) -> Iterator[None]:
    """Print an expected error as one line without a traceback.

    ``faults`` and errors of the operating system exit with 1.  Every other ``ValueError`` or ``TypeError`` is about an
    argument: it exits with 2, as does a fault whose ``wrong_use`` is true.
    """
    try:
        yield
    except BrokenPipeError:  # `| head`: click ends the command
        raise
    except (ValueError, TypeError, OSError, *faults) as error:
        broken = isinstance(error, (OSError, *faults)) and not getattr(error, "wrong_use", False)
        errors.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(1 if broken else WRONG_USE) from error
