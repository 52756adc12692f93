"""``kernel-index rollout-check``: table, exit status, and a receipt that ``prove --verify`` accepts or refuses."""

import json

import pytest
from typer.testing import CliRunner

from kernel_index.cli import commands
from kernel_index.core.digest import digest
from kernel_index.lm.rollout_axes import AXES
from kernel_index.proofs import rollout

pytestmark = pytest.mark.native


def run(*arguments: str):
    return CliRunner().invoke(commands.app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_the_verifier_knows_every_axis():
    assert tuple(AXES) == rollout.AXES


@pytest.fixture(scope="module")
def checked(finished, tmp_path_factory):
    """A trained checkpoint, what the command says of it, and its receipt."""
    path = tmp_path_factory.mktemp("check") / "receipt.json"
    options = ("--tokens", 60, "--compiler", "aot_eager", "--json", path)
    return run("rollout-check", "--checkpoint", finished.folder, *options), path


def test_a_trained_model_is_exact(checked):
    done, path = checked
    assert done.exit_code == 0, done.output
    assert "all bits are equal" in done.output
    receipt = json.loads(path.read_text())
    assert receipt["exact"] is True
    assert receipt["request"]["device"] == "cpu"
    assert set(receipt["findings"]["A"]) == set(AXES)
    assert receipt["recipes"]["attention"] == receipt["recipes"]["fa4_kvcache_decode"]
    assert {"kernel-index", "python", "torch", "isa"} <= set(receipt["machine"])


def test_verify_accepts_it(checked):
    done = run("prove", "--verify", checked[1])
    assert done.exit_code == 0
    assert "training and rollout have the same bits" in done.output


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.update(exact=False), "does not say that all bits are equal"),
        (lambda r: r["findings"]["A"]["page size"].update(differing=3), "page size: 3 of"),
        (lambda r: r["findings"]["A"].pop("prefix reuse"), "A, prefix reuse: was not compared"),
        (lambda r: r["findings"]["A"]["batch size"].update(refused="no form"), "batch size: refused: no form"),
        (lambda r: r["findings"]["A"]["batch size"].update(compared=0), "batch size: nothing was compared"),
        (lambda r: r["machine"].pop("torch"), "does not tell torch of the machine"),
        (lambda r: r["model"].update(pattern="AM"), "M: was not checked"),
        (lambda r: r["recipes"].clear(), "does not tell the recipe of attention"),
        (lambda r: r["recipes"].update(linear="0" * 12), "linear: '000000000000' is no recipe of this version"),
        (lambda r: r["recipes"].pop("linear"), "does not tell the recipe of linear"),
        (lambda r: r["model"].update(pattern="", findings={}), "names no layer of the model, got ''"),
        (lambda r: r["model"].update(pattern=["A"]), "names no layer of the model, got ['A']"),
        (lambda r: r["request"].update(compiler="eager"), "'eager' compiles nothing"),
        (lambda r: r["request"].pop("device"), "does not tell device of the request"),
        (lambda r: r["machine"].pop("isa"), "does not tell isa of the machine"),
        (lambda r: r["findings"]["A"]["batch size"].update(compared=1), "1 values are not the log-probabilities of 60"),
        (lambda r: r["findings"]["A"]["batch size"].update(refused=None), "batch size: refused: None"),
        (lambda r: r.pop("model"), "is not as rollout-check writes it"),
    ],
)
def test_verify_refuses_a_changed_one(checked, tmp_path, change, problem):
    receipt = json.loads(checked[1].read_text())
    change(receipt)
    receipt["digest"] = digest(receipt)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(receipt))
    done = run("prove", "--verify", path)
    assert done.exit_code == 1
    assert problem in done.output


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["request"].update(dtype="bfloat16"),
        lambda r: r["machine"].update(torch="2.99.0"),
        lambda r: r["model"].update(dim=4096),
        lambda r: r.pop("digest"),
    ],
)
def test_verify_refuses_one_that_was_edited(checked, tmp_path, change):
    receipt = json.loads(checked[1].read_text())
    change(receipt)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(receipt))
    done = run("prove", "--verify", path)
    assert done.exit_code == 1
    assert "digest does not fit the content" in done.output


def test_verify_says_what_is_no_receipt(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text('{"machine": {}, "rows": []}')
    done = run("prove", "--verify", path)
    assert done.exit_code == 1
    assert "is no receipt: `kernel-index prove fa4 --json` and" in " ".join(done.output.split())


def test_few_tokens_have_two_sequences(finished):
    """So that every axis has something to compare."""
    done = run("rollout-check", "--checkpoint", finished.folder, "--tokens", 2, "--compiler", "eager")
    assert done.exit_code == 0, done.output


def test_wrong_use():
    assert run("rollout-check", "--checkpoint", "/nowhere", "--tokens", 1).exit_code == 2
    done = run("rollout-check", "--checkpoint", "/nowhere")
    assert done.exit_code == 2
    assert "must be a checkpoint" in done.output
    done = run("rollout-check", "--checkpoint", "/nowhere", "--device", "nothing")
    assert done.exit_code == 2
    assert "must be a device of this machine, got 'nothing'" in done.output
