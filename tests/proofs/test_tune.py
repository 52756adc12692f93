"""``kernel-index tune``: only right results are timed, and its file is what ``auto`` asks."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kernel_index.cli import commands
from kernel_index.core import measured
from kernel_index.core.target import Target
from kernel_index.proofs.tune import attention_cells, command, decode_cells, rows, timing

SMALL = [
    cell.small() for cell in attention_cells.TUNED if cell.name in ("full 2k", "sink + window 128 8k head size 64")
]


@pytest.fixture
def clock(monkeypatch):
    """Every later timing takes longer, so that the second one of a backend is dropped."""
    taken = iter(range(1, 1000))
    monkeypatch.setattr(timing, "device_us", lambda calls: (float(next(taken)), "graph"))


def test_the_cells_have_names_of_their_own_and_every_kind():
    names = [c.name for c in attention_cells.TUNED] + [c.name for c in decode_cells.CELLS]
    assert len(set(names)) == len(names)
    kinds = {c.kinds for c in attention_cells.TUNED}
    assert {(), ("full",), ("window",), ("documents",), ("documents", "window"), ("softcap",), ("sink",)} <= kinds


def test_rows_of_attention(clock):
    said = []
    found = list(rows.attention_rows(SMALL, said.append, "cpu", ("triton", "sdpa", "fa4")))
    assert [(r["cell"], r["kind"], r["us"]) for r in found] == [
        ("sink + window 128 8k head size 64 infer", ["infer", "sink", "window"], {"triton": 1.0}),
        ("sink + window 128 8k head size 64 train", ["train", "sink", "window"], {"triton": 3.0}),
        ("full 2k infer", ["infer", "full"], {"triton": 5.0, "sdpa": 6.0}),
        ("full 2k train", ["train", "full"], {"triton": 9.0, "sdpa": 10.0}),
    ], "a backend that declines has no time; of two times the smaller counts"
    assert found[0]["sizes"] == [16, 48, 1]
    assert said == []


def test_a_wrong_result_is_not_timed(clock, monkeypatch):
    inputs = attention_cells.AttentionInputs
    right = inputs.ours
    monkeypatch.setattr(
        inputs, "ours", lambda self, b: (lambda: 2 * right(self, b)()) if b == "sdpa" else right(self, b)
    )
    said = []
    (infer, train) = rows.attention_rows(SMALL[1:], said.append, "cpu", ("triton", "sdpa"))
    assert (list(infer["us"]), list(train["us"])) == (["triton"], ["triton"])
    assert said[0].startswith("full 2k, sdpa: relative error 1.0e+00")


def test_rows_of_decoding_make_a_file_that_auto_asks(clock, monkeypatch, tmp_path):
    cell = decode_cells.CELLS[0].small()
    found = list(rows.decode_rows([cell], pytest.fail, "cpu", ("triton", "sdpa")))
    assert found == [
        {"cell": "1 row of 48 page 16", "kind": ["paged"], "sizes": [48, 1, 16], "us": {"triton": 1.0, "sdpa": 2.0}}
    ]
    facts = {"device": "A card", "date": "2026-01-02", "versions": {}}
    (tmp_path / "sm_90.json").write_text(rows.text_of(facts, {"fa4_kvcache_decode": found}))
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured.forget()
    call = (Target("cuda", 90), ("paged",), (64, 1, 16), lambda name: True)
    said = measured.slower("fa4_kvcache_decode", "sdpa", *call)
    assert said == f"{measured.SLOWER}: 2.00x of triton at 1 row of 48 page 16 (A card, 2026-01-02)"
    assert measured.slower("fa4_kvcache_decode", "triton", *call) is None
    measured.forget()


def test_without_a_gpu_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(commands.app, ["tune", "--out", str(tmp_path / "a.json")])
    assert result.exit_code == command.REFUSED == 4
    assert result.output == "error: kernel-index tune needs a CUDA or ROCm device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gpu(monkeypatch, clock):
    """The command with a card that is not there, over one decoding cell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("set_stream", "Stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(command, "target_of", lambda device: Target("cuda", 80))
    made = {"device": "A card", "date": "2026-01-02", "torch": "2"}
    monkeypatch.setattr(command, "machine", lambda device: dict(made))
    measure = rows.decode_rows
    monkeypatch.setattr(
        rows, "decode_rows", lambda cells, say: measure([c.small() for c in cells], say, "cpu", ("triton",))
    )
    return made


def test_several_calls_fill_one_file_of_one_day(gpu, tmp_path):
    out = tmp_path / "a.json"

    def run(only: str):
        return CliRunner().invoke(commands.app, ["tune", "--out", str(out), "--only", only])

    result = run("1 row of 1k page 64")
    assert result.exit_code == 0, result.output
    assert "1 row of 48 page 16: triton 1.0 µs" in result.output
    assert "Place of this table: kernel_index/core/crossovers/sm_80.json" in result.output
    assert run("8 rows of 1k page 64").exit_code == 0
    assert run("8 rows of 1k page 64").exit_code == 0
    content = json.loads(out.read_text())
    assert [r["cell"] for r in content["fa4_kvcache_decode"]] == ["1 row of 48 page 16", "2 rows of 48 page 16"]
    assert content["fa4_kvcache_decode"][1]["us"] == {"triton": 5.0}, "measured again"
    gpu["date"] = "2026-01-03"
    before = out.read_text()
    result = run("1 row of 1k page 64")
    assert result.exit_code == 2
    assert "must be a new file or one of this machine, these versions and this day" in result.output
    assert out.read_text() == before


def test_the_committed_files_are_what_the_command_writes():
    for path in measured.FOLDER.glob("*.json"):
        content = json.loads(path.read_text())
        ops = {key: content.pop(key) for key in ("attention", "fa4_kvcache_decode")}
        assert path.read_text() == rows.text_of(content, ops)
