"""A proof that compares nothing is not passed, and a name that does not exist is wrong use: one line, status 2."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from kernel_index.core.target import has_package
from kernel_index.proofs import numerics
from kernel_index.proofs.commands import app

WITHOUT_TRITON = """
import sys, importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else find(name, *rest)
sys.modules["triton"] = None
from kernel_index.proofs.commands import app
app()
"""


def prove(*arguments):
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("numerics --op nothing", "--op must be one of"),
        ("numerics --op attention --backend nope", "--backend must be one of"),
        ("numerics --backend shraded", "--backend must be one of"),
        (
            "numerics --op fused_relu_squared --backend native",
            "--backend must be one of triton, inductor, reference for fused_relu_squared, got 'native'",
        ),
        ("numerics --op attention --op fused_relu_squared --backend native", "for fused_relu_squared, got 'native'"),
        ("numerics --op fused_relu_squared --device foo", "--device must be a device of this machine, got 'foo'"),
        ("numerics --op fused_relu_squared --device meta", "--device must be a device of this machine, got 'meta'"),
        ("traffic --op nothing", "--op must be one of"),
        ("traffic --op attention", "--op must be one of"),
        ("tpu --generation v1", "--generation must be one of v5e"),
        ("tpu --case nothing", "--case must be one of"),
        ("tpu --tokens 0", "'--tokens'"),
        ("fa4 --dtype float8", "'--dtype'"),
        ("--verify nothing.json", "does not exist"),
    ],
)
def test_a_name_that_does_not_exist_is_wrong_use(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = prove(*arguments.split())
    assert done.exit_code == 2
    assert message in done.output
    assert "passed" not in done.output


@pytest.mark.skipif(not has_package("triton"), reason="needs the triton package")
@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--op", "nothing", "--op must be one of"),
        ("--op", "token_log_probs", "--op must be one of"),
        ("--target", "sm20", "--target must be one of sm80"),
    ],
)
@pytest.mark.thorough_if(when=lambda option, name, message: option != "--target")
def test_a_name_that_cannot_be_compiled_is_wrong_use(option, name, message):
    """In a process of its own: this one imports Triton for its interpreter."""
    command = [sys.executable, "-m", "kernel_index.cli", "prove", "aot", option, name]
    environment = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_wrong_use():
    done = prove("numerics", "--op", "fused_relu_squared", "--device", "cuda")
    assert done.exit_code == 2
    assert "--device must be a device of this machine, got 'cuda'" in done.output


def test_only_refusals_are_no_proof(tmp_path):
    out = tmp_path / "numerics.json"
    done = prove("numerics", "--quick", "--op", "fused_relu_squared", "--backend", "inductor", "--json", str(out))
    assert done.exit_code == 0
    done = prove(
        "numerics", "--quick", "--op", "fused_linear_cross_entropy", "--backend", "sharded", "--json", str(out)
    )
    assert done.exit_code == 1
    assert "nothing was compared" in done.output
    assert json.loads(out.read_text())["passed"] is False


def test_a_call_without_a_comparison_does_not_pass():
    assert not numerics.Verdict("op", "backend", "case", "float32").passes
    assert numerics.Verdict("op", "backend", "case", "float32", refused="a rule").passes


@pytest.mark.skipif(not has_package("triton"), reason="needs the triton package")
@pytest.mark.parametrize("proof", ["aot", "traffic"])
def test_a_proof_that_found_nothing_fails(proof, monkeypatch):
    from kernel_index.proofs import aot, ratios  # before the variable is unset: Triton reads it at its import

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(aot, "prove", lambda *_: iter(()))
    monkeypatch.setattr(ratios, "prove", lambda *_: iter(()))
    monkeypatch.setattr(ratios, "prove_peers", lambda *_: iter(()))
    assert prove(proof).exit_code == 1


@pytest.mark.thorough
def test_without_triton_the_backends_that_run_here_are_proven():
    def start(*arguments):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", WITHOUT_TRITON, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = start("numerics", "--quick", "--op", "fused_bias_dropout_add")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs the triton package" in done.stdout
    assert "numerics: passed" in done.stdout
    for proof in ("aot", "traffic"):
        refused = start(proof)
        assert refused.returncode == 2
        assert "needs the triton package" in refused.stdout
