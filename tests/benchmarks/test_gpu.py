"""The benchmarks of attention and decoding for a GPU: their dry run on a CPU, their files, and what they leave out."""

import json
import subprocess
import sys

import pytest
import torch
import typer

from benchmarks import gpu_models, gpu_plans, gpu_profile, gpu_session, gpu_sparse
from benchmarks.gpu_sparse_calls import Cell, Inputs
from kernel_index.index.entry import ROOT
from kernel_index.proofs.tune import timing


def dry(module: str, out, *options: str):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--dry-run", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.thorough
def test_the_dry_run_of_attention_gives_every_field(tmp_path):
    only = "sink + window,documents + window,causal 2k"
    said, content = dry("gpu_attention", tmp_path / "a.json", "--only", only)
    rows = {row["case"]: row for row in content["attention"]}
    assert list(rows) == [
        f"{cell} {direction}"
        for cell in ("causal 2k", "documents + window 1024 32k", "sink + window 128 8k head size 64")
        for direction in ("infer", "train")
    ]
    for row in rows.values():
        assert {"ms", "ran", "best", "regret", "share", "host_us", "all_ms"} <= set(row)
        assert "triton" in row["all_ms"]
        assert max(row["error"].values()) < 3e-2, row["case"]
    assert rows["causal 2k train"]["peer"] == "SDPA math"
    assert content["machine"]["date"]
    assert "left out: FA4: No module named 'flash_attn'" in said
    assert "left out: Flex: FlexAttention has no backward on a CPU" in said
    assert "errors over 2e-2 or NaN" in said


def test_the_dry_run_of_decoding_gives_every_field(tmp_path):
    out = tmp_path / "d.json"
    said, content = dry("gpu_decode", out, "--only", "8 rows of 1k page 64,moba")
    (row,) = content["decode"]
    assert (row["rows"], row["tokens"], row["page"]) == (8, 1024, 64)
    assert max(row["error"].values()) < 2e-2
    assert {"kernel_index triton", "SDPA contiguous"} < set(row["us"])
    assert row["peer"] == "SDPA contiguous"
    assert len(content["moba_decode"]) == 4
    assert "left out: FlashInfer: No module named 'flashinfer'" in said
    before = out.read_text()
    dry("gpu_decode", out, "--only", "8 rows of 1k page 64,moba")
    assert out.read_text() == before, "what the file holds is not measured again"


def test_several_processes_make_one_table(tmp_path):
    only = "relu2,rope,bias_add"
    said, content = dry("gpu_memory_bound", tmp_path / "m.json", "--only", only, "--processes", "2")
    assert [row["kernel"] for row in content["memory_bound"]] == ["rope", "relu2", "bias_add"]
    assert "within 2 % or 0.3 µs of the best in 6 of 6" in said
    assert "a process ended with" not in said


def test_no_time_no_cell(tmp_path):
    out = tmp_path / "a.json"
    command = [sys.executable, "-m", "benchmarks.gpu_attention", "--dry-run", "--out", str(out), "--seconds", "0"]
    said = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True).stdout
    assert "no time left for causal 8k" in said
    assert not out.exists()


def test_files_are_joined_by_rows(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        content = {"machine": {"device": "A"}, "notes": ["n"], "attention": [{"case": path.name}], "lost": []}
        path.write_text(json.dumps(content))
    gpu_session.join(files, tmp_path / "c")
    content = json.loads((tmp_path / "c").read_text())
    assert content == {"machine": {"device": "A"}, "notes": ["n"], "attention": [{"case": "a"}, {"case": "b"}]}
    files[1].write_text(json.dumps(content | {"machine": {"device": "B"}}))
    with pytest.raises(typer.BadParameter, match="one machine, commit and day"):
        gpu_session.join(files, tmp_path / "c")


def session(out, **content):
    made = gpu_session.Session.__new__(gpu_session.Session)
    made.content, made.left_out, made.dry, made.out, made.warm = content, {}, True, out, ""
    return made


def test_where_a_contender_broke_the_device_another_process_goes_on_without_it(monkeypatch, tmp_path):
    class Gone(BaseException):
        """execv does not return."""

    def execv(*_):
        raise Gone

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_session.os, "execv", execv)
    contenders = {"peer": broken, "ours": lambda: 3}
    with pytest.raises(Gone):
        session(tmp_path / "a").measured("cell", contenders, dict)
    content = json.loads((tmp_path / "a").read_text())
    assert content["lost"] == [["cell", "peer"]]
    assert session(tmp_path / "a", **content).measured("cell", contenders, lambda us: {"us": us}) == {"ours": {"us": 3}}


@pytest.mark.parametrize(("ours", "regret", "best"), [({"a": 2.0, "b": 1.0}, 2.0, "b"), ({"a": 2.0}, 1.0, "a")])
def test_regret_and_ratio(ours, regret, best):
    row = gpu_session.verdict(2.0, "a", ours, {"P": 4.0})
    assert row == {"ran": "a", "best": best, "regret": regret, "ratio": 0.5, "peer": "P"}


def test_a_contender_that_raises_is_left_out_and_said_once(monkeypatch, tmp_path):
    made, said = session(tmp_path / "a"), []
    monkeypatch.setattr(gpu_session.console, "print", lambda text, **_: said.append(text))

    def absent():
        raise gpu_session.LeftOut("not here")

    for cell in ("one", "two"):
        found = made.measured(cell, {"peer": absent, "ours": lambda: 3}, lambda value: {"us": value})
        assert found == {"ours": {"us": 3}}
    assert said == ["left out: peer: not here"]


def test_the_state_space_kernels_agree_with_pytorch_in_a_dry_run(capsys):
    from benchmarks import gpu_state_space

    gpu_state_space.main(device="cpu")
    said = capsys.readouterr().out
    for op in gpu_state_space.OPS:
        assert f"{op}, 1 × 40, 2 heads, 1 groups: copy" in said
    assert said.count("  kernel_index: 1 and 1 µs") == 3
    assert said.count("  PyTorch: 1 and 1 µs") == 3
    for line in said.splitlines():
        assert "apart" not in line or float(line.split()[-2]) < 1e-2


def test_the_dry_run_of_experts_compares_every_part(tmp_path):
    said, content = dry("gpu_experts", tmp_path / "e.json")
    rows = {row["case"]: row["contenders"] for row in content["experts"]}
    parts = ("router", "dispatch", "product", "combine", "layer")
    assert list(rows) == [f"tiny {activation} {part}" for activation in ("swiglu", "relu2") for part in parts]
    for case, found in rows.items():
        assert {"kernel_index"} < set(found), case
        assert max(of["error"] for of in found.values()) < 2e-2, case
    assert "kernel_index, by parts" in rows["tiny relu2 layer"]
    assert content["left_out"]["Megatron, one by one"] == "No module named 'megatron'"
    assert "ours ÷ the best other: forward us 1.00 of PyTorch" in said


def test_the_dry_run_of_the_loss_gives_every_contender(tmp_path):
    said, content = dry("gpu_loss", tmp_path / "l.json")
    (row,) = content["loss"]
    assert {"default", "all tokens", "log-sum-exp, all tokens", "half of the tokens", "token_stats"} < set(
        row["contenders"]
    )
    assert "token_stats ÷ token_log_probs: 1.000" in said


def test_every_table_of_the_models_goes_into_one_file(monkeypatch, tmp_path):
    ran, out = [], tmp_path / "m.json"

    class Done:
        returncode = 0

    def run(command, **_):
        ran.append(command[2])
        gpu_session.add_row(out, command[2], {"ms": 1.0})
        return Done()

    monkeypatch.setattr(gpu_models.subprocess, "run", run)
    monkeypatch.setattr(gpu_session, "described", lambda dry: {"device": "A"})
    gpu_models.main(out, only="gpu_loss,gpu_dense")
    assert ran == ["benchmarks.gpu_loss", "benchmarks.gpu_dense"]
    content = json.loads(out.read_text())
    assert content == {"machine": {"device": "A"}, **{name: [{"ms": 1.0}] for name in ran}}
    with pytest.raises(typer.BadParameter, match="--only must be of"):
        gpu_models.main(out, only="gpu_lost")


@pytest.mark.thorough
def test_the_dry_run_of_sparse_attention_gives_every_row(tmp_path):
    out = tmp_path / "s.json"
    said, content = dry("gpu_sparse", out)
    ours = {"clustered", "moba query_head", "attend"}
    rows = {(r["selection"], r["contender"].removeprefix("kernel_index ")): r for r in content["sparse"]}
    assert {name for selection, name in rows if selection == "shared"} == ours
    assert {name for selection, name in rows if selection == "random"} == {
        *ours, "dense SDPA", "router kv_group", "router query_head"}  # fmt: skip
    tokens = {r["contender"].removeprefix("kernel_index "): r for r in content["exact_tokens"]}
    assert set(tokens) == {"exact_token", "indexer"}
    for (_, name), row in [*rows.items(), *((("random", n), r) for n, r in tokens.items())]:
        is_selection = name.startswith(("router", "indexer"))
        assert ("train_ms" in row) is not is_selection
        assert row["forward_of_dense"] == 1.0, "nothing is timed in a dry run"
        assert is_selection or row["error"] < 3e-2, row
        assert name.startswith("dense") or row["by"] == "triton"
    assert {r["contender"] for r in content["break_even"]} == {f"kernel_index {n}" for n in (*ours, "exact_token")}
    missing = {"dense FA4": "flash_attn", "XunhaoLai NSA attend": "native_sparse_attention"}
    assert content["left_out"] == {name: f"No module named '{module}'" for name, module in missing.items()}
    assert "left out: dense FA4" in said


@pytest.mark.thorough
def test_the_dry_run_of_plans_gives_every_row(tmp_path):
    _, content = dry("gpu_plans", tmp_path / "p.json")
    rows = [(r["kind"], r["contender"]) for r in content["plans"]]
    assert rows == [
        ("blocks", "clustered"),
        ("blocks", "moba query_head"),
        ("blocks", "attend"),
        ("tokens", "exact_token"),
    ]
    assert content["left_out"] == {}


def test_a_plan_has_the_kernels_that_its_ranges_launched():
    def event(name, ts, dur):
        return {"name": name, "ts": ts, "dur": dur}

    events = {
        "user_annotation": [event("plan of unions_of", 5, 4), event("letter A", 0, 100)],
        "cpu_op": [
            event("kernel_index::block_sparse_list_plan", 20, 10),
            event("aten::sort", 22, 2),
            event("aten::plan", 50, 9),
        ],
    }
    kernels = [gpu_profile.Kernel("k", 0, 1, launched) for launched in (4, 6, 9.5, 20, 23, 29, 31, 51)]
    assert [k.launched for k in gpu_plans.of_plans(kernels, events)] == [6, 20, 23, 29]


def test_a_capture_that_fails_breaks_no_process():
    """The text of every CUDA error ends in advice about device-side assertions."""
    advice = " Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    assert not timing.is_broken(RuntimeError("operation failed due to a previous error during capture" + advice))
    assert timing.is_broken(RuntimeError("CUDA error: device-side assert triggered" + advice))


def test_break_even_lies_between_two_measured_lengths():
    assert gpu_sparse.crossing([(4096, 4.0), (16384, 0.25)]) == pytest.approx(8192)
    assert gpu_sparse.crossing([(4096, 0.5), (8192, 1.5), (16384, 2 / 3)]) == pytest.approx(8192 * 2**0.5)
    assert gpu_sparse.crossing([(4096, 0.9), (8192, 0.5)]) == 4096
    assert gpu_sparse.crossing([(4096, 0.9), (8192, 1.5)]) is None
    assert gpu_sparse.crossing([]) is None


def test_selected_tokens_of_the_benchmark_are_of_the_past_and_none_is_twice():
    for shared, tokens in ((False, 48), (True, 130)):
        inputs = Inputs(Cell("tokens", tokens, 2, 1, shared, width=16, count=12), "cpu")
        indices, valid = inputs._tokens()
        past = torch.arange(tokens) // (64 if shared else 1) * (64 if shared else 1) + 1
        assert torch.equal(valid[0].sum(-1), past.clamp(max=12))
        for t in range(tokens):
            found = indices[0, t][valid[0, t]]
            assert (found.diff() > 0).all()
            assert found.min() >= 0
            assert found.max() < past[t]
