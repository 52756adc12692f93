"""The numerics proof passes what is right and fails what is wrong, raises, or overflows."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from kernel_index.core.dispatch import Backend, always
from kernel_index.core.testing import Maker, suites
from kernel_index.proofs import numerics
from kernel_index.proofs.commands import app
from kernel_index.proofs.errors import Finding, assess

RELU = next(s for s in suites() if s.op == "fused_relu_squared")


def with_backend(run):
    """The suite with a backend ``wrong`` whose launcher is ``run``."""
    wrong = Backend("wrong", always, run)

    def function(x, *, backend="auto"):
        return run(x) if backend == "wrong" else RELU.function(x, backend=backend)

    return dataclasses.replace(RELU, backends=(wrong, *RELU.backends), function=function)


@pytest.mark.parametrize(
    ("label", "run"),
    [
        ("output 0", lambda x: torch.relu(x).square() * 1.001),
        ("gradient of x", lambda x: torch.relu(x).square().detach() + 0 * x),
        ("output 0", lambda x: torch.relu(x).square() * float("nan")),
    ],
    ids=["slightly off", "no gradient", "NaN"],
)
def test_a_wrong_backend_fails(label, run):
    call = RELU.cases[0].build(Maker(torch.float32))
    findings = assess(with_backend(run), "wrong", call)
    assert label in [f.label for f in findings if not f.passes]


def test_a_backend_that_raises_is_a_verdict_and_the_rest_goes_on(monkeypatch):
    def broken(suite, backend, kwargs):
        if backend == "reference":
            raise RuntimeError("out of order")
        return assess(suite, backend, kwargs)

    monkeypatch.setattr(numerics, "assess", broken)
    found = list(numerics.prove(ops=("fused_relu_squared",), backends=("triton", "reference"), every=False))
    assert {v.passes for v in found if v.backend == "reference"} == {False}
    assert all(v.passes for v in found if v.backend == "triton")


def test_the_command_reports_and_its_exit_status_says_so(tmp_path, monkeypatch):
    out = tmp_path / "numerics.json"
    options = ["numerics", "--quick", "--op", "fused_relu_squared", "--backend", "reference", "--json", str(out)]
    assert CliRunner().invoke(app, options).exit_code == 0
    assert json.loads(out.read_text())["passed"] is True
    monkeypatch.setattr(numerics, "assess", lambda *_: (_ for _ in ()).throw(RuntimeError("out of order")))
    assert CliRunner().invoke(app, options).exit_code == 1
    assert json.loads(out.read_text())["passed"] is False
    assert CliRunner().invoke(app, ["numerics", "--op", "nothing"]).exit_code == 2


def test_the_command_names_what_is_over_its_budget_and_not_what_has_the_largest_error(monkeypatch):
    findings = [Finding("output 0", error=1e-2, budget=1.0), Finding("gradient of x", error=1e-3, budget=1e-4)]
    monkeypatch.setattr(numerics, "assess", lambda *_: findings)
    options = ["numerics", "--quick", "--op", "fused_relu_squared", "--backend", "reference"]
    said = " ".join(CliRunner().invoke(app, options).output.split())
    assert "gradient of x" in said
    assert "output 0" not in said
