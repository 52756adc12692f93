"""Training learns, resumes bit for bit, survives a kill, and names what went wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kernel_index.core.force import reload_environment
from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm import commands
from kernel_index.lm.generate import generate, load_model
from kernel_index.lm.report import ReceiptRow, against_baseline, receipt_rows, with_notes
from kernel_index.lm.train import Trainer, TrainingError, read_metrics
from tests.lm.runs import config, losses


def test_it_learns(corpus, tmp_path):
    trainer = Trainer.start(config(corpus, steps=60, evaluate_every=60), tmp_path / "run")
    last = list(trainer.steps())[-1]
    assert last.validation < 0.75 * trainer.unigram


def test_same_seed_same_bits(finished, corpus, tmp_path):
    again = Trainer.start(config(corpus), tmp_path / "again")
    list(again.steps())
    assert losses(again.folder) == losses(finished.folder)
    other = Trainer.start(config(corpus, seed=4), tmp_path / "other")
    next(other.steps())
    assert losses(other.folder)[0] != losses(finished.folder)[0]


def test_only_the_newest_checkpoints_are_kept(finished):
    names = sorted(p.name for p in finished.folder.glob("checkpoint-*"))
    assert names == ["checkpoint-00000008", "checkpoint-00000012"]


def test_receipts_show_every_op(finished):
    ran = {row.op for row in receipt_rows(finished.receipts)}
    assert ran == {
        "attention",
        "fused_bias_dropout_add",
        "fused_linear_cross_entropy",
        "fused_relu_squared",
        "fused_residual_add_rms_norm",
        "fused_rope_qk",
        "gated_rms_norm",
    }


def test_a_run_is_not_overwritten(finished, corpus):
    before = losses(finished.folder)
    with pytest.raises(ValueError, match="out must be a new folder"):
        Trainer.start(config(corpus), finished.folder)
    assert losses(finished.folder) == before


def test_nonfinite_loss_stops_with_step_and_checkpoint(corpus, tmp_path):
    trainer = Trainer.start(config(corpus), tmp_path / "run")
    steps = trainer.steps()
    for _ in range(5):
        next(steps)
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"at step 6, on the packed rows (\d+, ){3}\d+; .*checkpoint-00000004"):
        next(steps)


def test_unreadable_checkpoint_is_named_and_kept(corpus, tmp_path):
    folder = tmp_path / "run"
    list(Trainer.start(config(corpus), folder).steps())
    broken = ckpt.newest(folder) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(ckpt.CheckpointError, match=r"cannot read .*00000012.*also there: checkpoint-00000008"):
        Trainer.resume(folder)
    assert broken.stat().st_size == 1000


def test_checkpoint_of_another_model_is_refused(finished, corpus, tmp_path):
    other = Trainer.start(config(corpus, model=replace(config(corpus).model, hidden=64)), tmp_path / "other")
    before = {n: t.clone() for n, t in other.model.state_dict().items()}
    with pytest.raises(ckpt.CheckpointError, match=r"of another model: .*up\.weight"):
        ckpt.load_model(other.model, ckpt.read(finished.folder))
    assert all(torch.equal(before[n], t) for n, t in other.model.state_dict().items())


def test_packed_documents_cost_what_they_cost_alone(finished, corpus):
    """Documents that share a row do not see each other: losses equal those of one document per row."""
    model = finished.model.eval()
    rows = finished.rows
    packed = rows.batch([i for i, r in enumerate(rows.rows) if len(r) > 1][:3])
    with torch.no_grad():
        together = model.loss(packed, reduction="none", z_loss=0.0)
        for b in range(packed.tokens.shape[0]):
            for number in range(int(packed.doc_ids[b].max()) + 1):
                at = packed.doc_ids[b] == number
                alone = packed._make(t[b : b + 1][:, at] if t.ndim == 2 else at.sum()[None] for t in packed)
                alone = alone._replace(doc_ids=torch.zeros_like(alone.doc_ids))
                expected = model.loss(alone, reduction="none", z_loss=0.0)
                torch.testing.assert_close(together[b : b + 1][:, at], expected, rtol=2e-5, atol=2e-5)
    model.train()


def test_generation_continues_and_is_reproducible(finished):
    model = load_model(finished.folder)
    first = "".join(generate(model, "def ", 20, seed=1))
    assert first == "".join(generate(model, "def ", 20, seed=1))
    assert first != "".join(generate(model, "def ", 20, seed=2))
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        list(generate(model, "x", 1, top_k=0))


def cli(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "kernel_index.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def start_run(corpus, out, steps):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "kernel_index.cli", "train", "--preset", "nano", "--data", str(corpus)),
            *("--out", str(out), "--steps", str(steps), "--checkpoint-every", "5"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(out: Path, process) -> None:
    deadline = time.monotonic() + 120
    while ckpt.newest(out) is None:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.05)


@pytest.mark.thorough
def test_ctrl_c_saves_and_resume_finishes_with_the_same_bits(whole_run, corpus, tmp_path):
    folder, printed = whole_run
    assert "Which kernels ran" in printed
    assert "unigram baseline" in printed
    assert "Goodput" in printed
    assert (folder / "report.html").read_text().count("<svg") == 1
    out = tmp_path / "cut"
    process = start_run(corpus, out, 60)
    wait_for_checkpoint(out, process)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "--resume" in printed
    again = cli("train", "--resume", "--out", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert losses(out) == losses(folder)


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    """60 steps by the command line, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "sixty"
    done = cli("train", "--preset", "nano", "--data", corpus, "--out", folder, "--steps", 60)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.thorough
def test_kill_loses_nothing_and_the_curve_is_the_same_bit_for_bit(whole_run, corpus, tmp_path):
    out = tmp_path / "killed"
    process = start_run(corpus, out, 60)
    wait_for_checkpoint(out, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    again = cli("train", "--resume", "--out", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Resuming" in again.stdout
    assert [m.step for m in read_metrics(out)] == list(range(1, 61))
    assert losses(out) == losses(whole_run[0])
    ours, whole = ckpt.read(out), ckpt.read(whole_run[0])
    for part in ("model", "optimizer"):
        for name, tensor in getattr(whole, part).items():
            assert torch.equal(tensor, getattr(ours, part)[name]), name


@pytest.mark.thorough
def test_full_disk_stops_clearly_and_keeps_the_last_checkpoint(corpus, tmp_path):
    out = tmp_path / "full"
    first = cli("train", "--preset", "nano", "--data", corpus, "--out", out, "--steps", 2)
    assert first.returncode == 0, first.stderr
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from kernel_index.cli.main import main; sys.argv = ['kernel-index', *sys.argv[1:]]; main()"
    )
    args = ["train", "--resume", "--out", str(out), "--steps", "4", "--checkpoint-every", "1"]
    plain = {**os.environ, "KERNEL_INDEX_BACKEND": "reference"}  # the limit would hit the compiler's cache first
    failed = subprocess.run(
        [sys.executable, "-c", limited, *args], capture_output=True, text=True, timeout=300, env=plain
    )
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "cannot write" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert ckpt.read(out).step == 2
    assert not list(out.glob(".*draft"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "--preset", "huge"), "preset must be one of"),
        (("train", "--data", "/nowhere/at/all"), "--data must be a folder or a file of text"),
        (("train", "--resume", "--out", "/nowhere/at/all"), "--out must be a run folder, got /nowhere/at/all"),
        (("train", "--dtype", "int8"), "invalid choice 'int8' for argument '--dtype'"),
        (("train", "--glob", "/etc/*"), "--glob must be a pattern of paths below the folder"),
        (("train", "--steps", "3", "--set", "steps=4"), "--set steps must not repeat --steps, got '4' beside it"),
        (("train", "--set", "accumulate"), "--set must be NAME=VALUE, as accumulate=2"),
        (("generate", "--checkpoint", "/nowhere/at/all"), "must be a checkpoint"),
    ],
)
@pytest.mark.thorough_if(when=lambda args, message: "--set" not in args)
def test_bad_options_get_one_clear_line(tmp_path, args, message):
    result = cli(*args, cwd=tmp_path)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.thorough
def test_resume_refuses_another_seed(finished):
    result = cli("train", "--resume", "--out", finished.folder, "--seed", 9)
    assert result.returncode == 2
    assert "--seed must stay 3" in " ".join(result.stderr.split())


@pytest.mark.thorough
def test_settings_reach_the_run_and_wrong_ones_are_named(corpus, tmp_path):
    out = tmp_path / "run"
    args = ("train", "--preset", "nano", "--data", corpus, "--out", out, "--set", "steps=1")
    done = cli(*args, "--set", "accumulate=2", "--set", "recompute=true", "--set", "clip=2", "--backend", "reference")
    assert done.returncode == 0, done.stderr
    saved = json.loads((out / "config.json").read_text())
    assert (saved["steps"], saved["accumulate"], saved["recompute"], saved["clip"]) == (1, 2, True, 2.0)
    again = cli("train", "--resume", "--out", out, "--set", "accumulate=3")
    assert again.returncode == 2
    assert "--accumulate must stay 2 when the run is resumed, got 3" in " ".join(again.stderr.split())


@pytest.mark.thorough
def test_the_model_has_options_too_and_the_result_is_json(corpus, tmp_path):
    out = tmp_path / "run"
    args = ("train", "--preset", "nano", "--data", corpus, "--out", out, "--steps", 1, "--json")
    done = cli(*args, "--model.pattern", "A", "--model.windows", 16, "--model.hidden", 64, "--backend", "reference")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["finished"], result["step"], result["folder"]) == (True, 1, str(out))
    assert {row["backend"] for row in result["kernels"]} == {"reference"}
    assert "Which kernels ran" in done.stderr
    model = json.loads((out / "config.json").read_text())["model"]
    assert (model["pattern"], model["windows"], model["hidden"], model["dim"]) == ("A", [16], 64, 64)


def test_presets_are_listed_with_parameters_and_flops(monkeypatch, capsys):
    monkeypatch.setattr(commands, "console", Console(width=200))
    commands.presets_command()
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in re.split("[┃│]", line)] for line in printed.splitlines()]
    names, parameters = (next(row for row in rows if fact in row) for fact in ("preset", "parameters"))
    for name, expected in (("tiny", "3,554,776"), ("small", "63,289,952"), ("base", "635,960,128")):
        assert parameters[names.index(name)] == expected
    assert "MFLOP" in printed


@pytest.mark.thorough
def test_forced_reference_trains_to_the_same_loss(finished, corpus, tmp_path, monkeypatch):
    """The plain path is one environment variable away, and its receipts say so."""
    monkeypatch.setenv("KERNEL_INDEX_BACKEND", "reference")
    reload_environment()
    trainer = Trainer.start(config(corpus, steps=3), tmp_path / "plain")
    list(trainer.steps())
    assert {r.ran for r in trainer.receipts} == {"reference"}
    assert {r.forced_by for r in trainer.receipts} == {"KERNEL_INDEX_BACKEND"}
    for ours, plain in zip(read_metrics(finished.folder), read_metrics(trainer.folder), strict=False):
        assert ours.loss == pytest.approx(plain.loss, rel=1e-4)


@pytest.mark.thorough
def test_one_file_of_text_is_trained_on(tmp_path):
    data = tmp_path / "corpus.txt"
    data.write_text("To be, or not to be, that is the question.\n" * 200)
    done = cli("train", "--preset", "nano", "--data", data, "--out", tmp_path / "run", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "To be, " in done.stdout.split("Generated:")[1], "the sample continues the data, not Python"
    assert "0 GFLOP" not in done.stdout
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["data"], saved["glob"]) == (str(data), None)


def test_a_loss_above_the_baseline_is_not_said_to_be_below_it():
    assert against_baseline(3.0, 4.0) == "25 % below it"
    assert against_baseline(5.0, 4.0) == "25 % above it"


def test_generate_prints_nothing_before_an_error(finished):
    failed = cli("generate", "--checkpoint", finished.folder, "--prompt", "abc", "--top-p", 2)
    assert failed.returncode == 2
    assert failed.stdout == ""


def test_a_reason_of_many_rows_is_written_once():
    rows = [ReceiptRow(op, "cpu", 1, "triton: needs a GPU; native: too small") for op in "abc"]
    rows += [ReceiptRow("d", "cpu", 1, "triton: needs a GPU"), ReceiptRow("e", "native", 1, "first choice")]
    rows[0] = rows[0]._replace(reason="triton: needs a GPU; native: no C++ compiler; flex: no GPU")
    short, notes = with_notes(rows)
    assert notes == ["triton: needs a GPU"]
    assert [r.reason for r in short] == [
        "(1) native: no C++ compiler; flex: no GPU", *["(1) native: too small"] * 2, "(1)", "first choice",
    ]  # fmt: skip
