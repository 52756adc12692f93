"""Tables keep their words whole in a narrow terminal, and print as JSON; the machine is really asked."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from kernel_index.cli import commands
from kernel_index.core import target, terminal
from kernel_index.index.entries import ENTRIES

ROWS = [
    ("fused_residual_add_rms_norm", "inductor", "needs a CUDA device: FlexAttention has no backward"),
    ("a", "b", ""),
]
HEADER = ("op", "backend", "why not")


def printed(command: str, columns: int) -> str:
    environment = {**os.environ, "COLUMNS": str(columns)}
    start = [sys.executable, "-m", "kernel_index", *command.split()]
    done = subprocess.run(start, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def words(text: str) -> set[str]:
    return set(re.sub("[│┃━┏┓┗┛┡┩├┤─└┘┌┐╇┳┴┬┼╞╡╭╮╰╯]", " ", text).split())


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize(
    "command", ["list", "show attention", "doctor", "presets", "prove numerics --quick --op grouped_product"]
)
@pytest.mark.thorough_if(when=lambda command, columns: columns == 80 or command != "list")
def test_no_word_is_broken_in_a_narrow_terminal(command, columns):
    text = printed(command, columns)
    assert "…" not in text
    fits = [line for line in text.splitlines() if len(line) <= columns or " " not in line.strip()]
    assert [line for line in text.splitlines() if line not in fits and len(line.split()) > 3] == []
    empty = {"why", "refused", "problem"}  # headers of columns that may be empty: a paragraph leaves them out
    assert words(printed(command, 240)) - words(text) - empty == set()


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 200])
@pytest.mark.parametrize("turned", [False, True])
def test_a_table_or_paragraphs(columns, turned, capsys):
    terminal.print_table(Console(width=columns), HEADER, ROWS, "Which kernels ran", turned=turned)
    text = capsys.readouterr().out
    assert words(text) >= {w for row in ROWS for cell in row for w in cell.split()}
    assert "…" not in text
    assert ("┃" in text) == (columns >= 60)


def test_cells_are_text_and_not_markup(capsys):
    terminal.print_table(Console(width=80), ("a", "b"), [("[red]x[/]", Text("spills", style="red"))])
    assert "[red]x[/]" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["list", "list ki.attention", "show attention", "doctor", "presets"])
def test_json_is_all_that_is_printed(command):
    json.loads(CliRunner().invoke(commands.app, [*command.split(), "--json"]).stdout)


def test_figures_of_a_proof_as_json_on_the_standard_output():
    shown = json.loads(printed("prove numerics --quick --op grouped_product --backend reference --json -", 80))
    assert shown["passed"]
    assert {row["op"] for row in shown["rows"]} == {"grouped_product"}


def test_list_by_function_name():
    shown = json.loads(CliRunner().invoke(commands.app, ["list", "ki.attention", "moba_decode", "--json"]).stdout)
    assert [e["name"] for e in shown] == ["dense_attention", "moba_block_sparse_decode"]
    assert len(ENTRIES) > 2


@pytest.mark.parametrize(
    ("capability", "onednn", "instructions"),
    [("AVX512", True, "AVX512"), ("AVX512", False, "AVX2"), ("AVX2", True, "AVX2"), ("DEFAULT", True, None)],
)
def test_native_is_what_the_cpu_can_do(capability, onednn, instructions, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(target, "has_cxx_compiler", lambda: True)
    asked = (target.vector_instructions, target._has_vectors)
    for question in asked:
        question.cache_clear()
    try:
        found, text = target.vector_instructions(), CliRunner().invoke(commands.app, ["doctor"]).output
    finally:
        for question in asked:
            question.cache_clear()
    assert found == instructions
    assert ("✓ native" in text) == (instructions is not None)
    assert (f"✗ native: {target.NO_VECTORS}" in " ".join(text.split())) == (instructions is None)
