"""Records of proofs: what was run, interpreted or compiled, and how often it passed."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import kernel_index as ki
from kernel_index.cli import commands
from kernel_index.core import atomic_write as files
from kernel_index.core.triton import launch
from kernel_index.proofs import record
from kernel_index.proofs.errors import Finding
from kernel_index.proofs.numerics import Verdict

RIGHT = (Finding("output 0", 0.1, 1.0),)
PASSED = {"passed": 1, "refused": 0, "failed": 0}


def test_a_triton_kernel_on_the_cpu_is_interpreted_and_elsewhere_run(monkeypatch):
    verdicts = [Verdict("op", backend, "case", "float32", RIGHT) for backend in ("triton", "reference")]
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    assert record.of_numerics(verdicts, "cpu")["op"] == {
        "triton": {"interpreted": PASSED},
        "reference": {"run": PASSED},
    }
    assert record.of_numerics(verdicts, "cuda")["op"]["triton"] == {"run": PASSED}


def test_each_outcome_is_counted():
    wrong = (Finding("output 0", 1.0, 0.1),)
    rest = [{"refused": "a rule"}, {"raised": "RuntimeError"}, {"findings": wrong}, {"findings": RIGHT}]
    counts = record.of_numerics([Verdict("op", "cpu", "case", "float32", **r) for r in rest], "cpu")
    assert counts["op"]["cpu"]["run"] == {"passed": 1, "refused": 1, "failed": 2}


def test_what_did_not_compile_is_counted_as_failed():
    found = [SimpleNamespace(op="op", target="sm90", error=error) for error in ("", "", "out of registers")]
    assert record.of_aot(found) == {"op": {"triton": {"sm90": {"compiled": 2, "failed": 1}}}}


def test_prove_writes_a_record(tmp_path):
    out = tmp_path / "record.json"
    arguments = ["prove", "numerics", "--quick", "--op", "fused_relu_squared", "--backend", "reference"]
    result = CliRunner().invoke(commands.app, [*arguments, "--record", str(out)])
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["proof"] == "numerics"
    assert content["machine"]["torch"] == torch.__version__
    assert content["counts"] == {"fused_relu_squared": {"reference": {"run": PASSED | {"passed": 3}}}}


@pytest.mark.parametrize("content", ["", '{"counts": {"a"', "[]", "{}", '{"counts": 3}', "[" * 50_000])
def test_a_file_that_is_no_record_is_refused_before_the_work_and_kept(tmp_path, content):
    out = tmp_path / "record.json"
    out.write_text(content)
    for command in ("numerics", "aot"):
        result = CliRunner().invoke(commands.app, ["prove", command, "--record", str(out)])
        assert result.exit_code == 2
        assert "record must be a new file or one that" in " ".join(result.output.split())
    with pytest.raises(ValueError, match="record must be a new file"):
        record.write(out, "numerics", {})
    assert out.read_text() == content


def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    record.write(out, "numerics", {"a": {}})
    before = out.read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        record.write(out, "numerics", {"b": {}})
    assert out.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_record_names_the_version_of_the_index():
    assert record.machine()["kernel-index"] == ki.__version__


def test_a_record_grows_function_by_function_on_one_machine(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    record.write(out, "numerics", {"b": {}, "c": {"cpu": {"run": PASSED}}})
    record.write(out, "numerics", {"a": {}, "c": {}})
    assert json.loads(out.read_text())["counts"] == {"a": {}, "b": {}, "c": {}}
    monkeypatch.setattr(record, "machine", lambda device: {"processor": "another"})
    record.write(out, "numerics", {"d": {}})
    assert json.loads(out.read_text())["counts"] == {"d": {}}, "what another machine saw is not mixed in"
