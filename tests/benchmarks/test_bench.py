"""``python -m benchmarks``: nothing wrong is reported, files say what they hold, and regressions have names."""

import importlib
import inspect
import json
from dataclasses import replace
from functools import partial

import pytest
from typer.testing import CliRunner

from benchmarks.command import app
from benchmarks.figures import change, collect, peers, saved, verify
from benchmarks.harness import Comparison, Row
from kernel_index.index.entry import ROOT
from kernel_index.proofs.errors import Finding
from kernel_index.proofs.numerics import Verdict

GPU = ROOT.parent / "benchmarks" / "results" / "nvidia-h200-2026-11-24.json"


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)])


def figures(ours: float = 1.0, eager: float = 4.0, compiled: float = 2.0, memory: int = 100) -> saved.Figures:
    rows = [
        Row("kernel_index", [ours] * 3, 9.0, memory),
        Row("eager", [eager], 9.0, 200),
        Row("compiled", [compiled], 9.0),
    ]
    return saved.Figures([Comparison("relu², float32", rows, "kernel_index")], {"threads": 2}, peers={"Peer": "why"})


@pytest.fixture
def file(tmp_path):
    def write(name: str, content: saved.Figures):
        saved.save(content, tmp_path / name)
        return tmp_path / name

    return write


def test_a_file_holds_what_was_saved(file):
    assert saved.load(file("a.json", figures())) == figures()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"comparisons": [{"other": 1}], "machine": {}}'])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="FILE must hold saved figures, got"):
        saved.load(path)
    result = run("--load", path)
    assert result.exit_code == 2
    assert result.output.startswith("error: FILE must hold")


def test_a_gpu_file_is_shown_with_its_share_of_the_bandwidth(tmp_path):
    out = tmp_path / "gpu.md"
    assert run("--load", GPU, "--markdown", out, "--plot", tmp_path / "gpu.svg").exit_code == 0
    line = next(x for x in out.read_text().splitlines() if x.startswith("| relu², forward | eager"))
    assert line.split(" | ")[5] == "0.50"
    assert "share of a copy" in out.read_text()
    svg = (tmp_path / "gpu.svg").read_text()
    assert svg.lstrip().startswith("<?xml")
    assert "NVIDIA H200" in svg or "<path" in svg


def test_every_contender_has_a_row_and_every_peer_a_reason(file, tmp_path):
    out = tmp_path / "a.md"
    result = run("--load", file("a.json", figures()), "--markdown", out)
    assert "| relu², float32 | eager | 4 s | 9 s | 0 MiB | 0.25 | 0.50 |" in out.read_text()
    assert "| Peer | why |" in out.read_text()
    assert "Peer: why" in result.output


def test_equal_files_have_no_regression(file):
    same = file("a.json", figures())
    result = run("--compare", same, same)
    assert result.exit_code == 0
    assert "no regression" in result.output


@pytest.mark.parametrize(
    ("new", "named"),
    [
        (figures(ours=1.2), ["relu², float32: time × 1.20"]),
        (figures(memory=120), ["relu², float32: memory × 1.20"]),
        (figures(compiled=1.0), []),  # the contender improved
        (figures(ours=2.0, eager=8.0, compiled=4.0), []),  # the machine was busy
        (figures(ours=1.09), []),
        (figures(ours=0.5), []),
    ],
)
def test_a_regression_is_named(file, new, named):
    assert change.regressions(change.changes(figures(), new)) == named
    result = run("--compare", file("old.json", figures()), file("new.json", new))
    assert result.exit_code == bool(named)
    for line in named:
        assert f"regression: {line}" in result.output


def test_what_only_one_file_has_is_named(file):
    other = replace(figures(), machine={"threads": 4}, comparisons=[replace(figures().comparisons[0], title="moved")])
    result = run("--compare", file("a.json", figures()), file("b.json", other))
    assert result.exit_code == 2, "nothing was compared"
    for line in ("only in the old file: relu²", "only in the new file: moved", "threads: 2 in the old file, 4 in"):
        assert line in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "NAME must be one of"),
        (["dispatch", "--no-verify", "--save", "x.json"], "leave --no-verify out"),
        (["dispatch", "--compare", "a.json", "b.json"], "take neither a NAME"),
        (["--load", "a.json", "--save", "x.json"], "nor --save"),
        (["dispatch", "--plot", "x.pdf"], "must be a file that ends in .svg or .png"),
    ],
)
def test_misuse_is_one_sentence_and_measures_nothing(monkeypatch, arguments, message):
    monkeypatch.setattr(collect, "collect", None)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.fixture
def dispatch(monkeypatch):
    module = importlib.import_module("benchmarks.dispatch")
    monkeypatch.setattr(module, "microseconds", lambda call, number=0: [1e-6])
    return module


def test_a_kernel_that_fails_its_proof_is_not_reported(monkeypatch, dispatch, tmp_path):
    wrong = Verdict("fused_relu_squared", "cpu", "odd", "float32", (Finding("output 0", 1.0, 0.1),))
    monkeypatch.setattr(verify, "prove", lambda **_: [wrong])
    out = tmp_path / "a.json"
    result = run("dispatch", "--save", out)
    assert result.exit_code == 1
    said = "dispatch is not reported: fused_relu_squared, cpu, case odd, float32: output 0 has error 1, budget 0.1"
    assert said in result.output
    content = json.loads(out.read_text())
    assert content["comparisons"] == []
    assert content["verified"]["fused_relu_squared"]["cpu"]["failed"] == 1


def test_a_kernel_that_cannot_be_proved_is_not_reported(monkeypatch, dispatch):
    refusal = Verdict("fused_relu_squared", "cpu", "odd", "float32", refused="needs a GPU")
    monkeypatch.setattr(verify, "prove", lambda **_: [refusal])
    result = run("dispatch")
    assert result.exit_code == 1
    assert "fused_relu_squared: no case of it runs here" in result.output


def test_a_proved_kernel_is_reported_with_its_proof(monkeypatch, dispatch, tmp_path):
    monkeypatch.setattr(verify, "prove", partial(verify.prove, backends=("reference",)))  # nothing is compiled
    out = tmp_path / "a.json"
    result = run("dispatch", "--save", out)
    assert result.exit_code == 0, result.output
    found = saved.load(out)
    assert [c.title for c in found.comparisons] == ["dispatch overhead"]
    assert found.verified["fused_relu_squared"]["reference"] == {"passed": 3, "refused": 0, "failed": 0}
    assert set(found.peers) == {p.name for p in peers.PEERS}


@pytest.mark.parametrize("name", collect.NAMES)
def test_every_question_says_what_it_measures(name):
    module = importlib.import_module(f"benchmarks.{name}")
    ops = verify.ops_of(module)
    assert ops or hasattr(module, "OPS"), (
        "a question calls ki.<function with backends>, or says in OPS what it measures"
    )
    assert set(ops) <= {suite.op for suite in verify.suites()}
    assert "rounds" in inspect.signature(module.main).parameters


def test_the_reason_of_a_peer(monkeypatch):
    liger, fla, _ = peers.PEERS
    monkeypatch.setattr(peers.torch.cuda, "is_available", lambda: False)
    assert liger.why_not() == "needs a CUDA device: its kernels have no CPU backend"
    monkeypatch.setattr(peers.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peers, "has_package", lambda name: False)
    assert liger.why_not() == "needs the liger_kernel package (pip install liger-kernel)"
    monkeypatch.setattr(peers, "has_package", lambda name: True)
    assert liger.why_not() == "timed by python -m benchmarks.gpu"
    assert fla.why_not() == "no question compares with it yet"
