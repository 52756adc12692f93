"""A proof passes only when everything was run and right: faults of every kind leave a receipt that does not.

The package is played by a stand-in on the CPU, so what cannot be met here are exactly the conditions on the device.
"""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import typer

import kernel_index as ki
from kernel_index.core.digest import digest
from kernel_index.core.target import has_package
from kernel_index.kernels.attention.dense_fa4_execute_proof.emit import emit
from kernel_index.kernels.attention.dense_fa4_execute_proof.request import ProofRequest
from kernel_index.kernels.attention.dense_fa4_execute_proof.runner import prove
from kernel_index.kernels.attention.dense_fa4_execute_proof.verify import problems, verify_file
from kernel_index.proofs import fa4 as command

REQUEST = ProofRequest(ki.ProofShape(1, 32, 4, 2, 16))

STAND_IN = """
import os, sys, time
import torch
FAULT = os.environ.get("FAULT", "")
if FAULT == "import":
    raise ModuleNotFoundError("No module named 'quack'", name="quack")

def flash_attn_func(q, k, v, causal=False):
    if FAULT == "crash":
        os.abort()
    if FAULT == "hang":
        time.sleep(600)
    if FAULT == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if FAULT == "exit":
        os._exit(0)
    if FAULT == "not_causal":
        causal = False
    if FAULT == "no_gradient_of_k":
        k = k.detach() + 0 * k
    t = [x.transpose(1, 2) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*t, is_causal=causal, enable_gqa=True).transpose(1, 2)
    if FAULT == "scaled":
        out = out * 1.05
    if FAULT in ("nan", "inf"):
        out = out + torch.zeros_like(out).index_fill(1, torch.tensor([3]), float(FAULT))
    if FAULT == "shape":
        out = out[:, :-1]
    if FAULT == "dtype":
        out = out.float()
    if FAULT == "slightly_wrong":
        out = out + 0.08
    return out, None
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> dict[str, str]:
    """Environment in which ``flash_attn.cute`` is the stand-in."""
    root = tmp_path_factory.mktemp("stand_in")
    (root / "flash_attn").mkdir()
    (root / "flash_attn" / "__init__.py").write_text("")
    (root / "flash_attn" / "cute.py").write_text(textwrap.dedent(STAND_IN))
    for name in ("flash_attn_4", "nvidia_cutlass_dsl"):
        folder = root / f"{name}-0.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.0\n")
    return {"PYTHONPATH": str(root)}


def run(stand_in, fault="", time_limit=120.0, **kwargs):
    return prove(
        REQUEST, mode="execute", device="cpu", time_limit=time_limit, environment=stand_in | {"FAULT": fault}, **kwargs
    )


@pytest.fixture(scope="module")
def honest(stand_in):
    return run(stand_in)


DEVICE_CONDITIONS = {
    "execute_proof_passed is not true",
    "program is not this version's",  # it was emitted for the CPU
    "version of cuda is missing",
    "version of driver is missing",
    "device is not a CUDA device",
    "device capability is none that flash-attn-4 runs on",
    "the profiler saw no flash-attn-4 forward kernel",
    "the profiler saw no flash-attn-4 backward kernel",
    "peak_memory_bytes is not a positive number",
}


def test_a_right_run_on_the_cpu_misses_the_device_and_nothing_else(honest):
    assert honest["state"] == "executed"
    assert honest["execute_proof_passed"] is False
    assert set(problems(honest)) <= DEVICE_CONDITIONS
    assert "device is not a CUDA device" in problems(honest)
    assert set(honest["runs"][0]["report"]["numerics"]) == {"out", "dq", "dk", "dv"}


@pytest.mark.thorough_if(when=lambda fault, **_: fault not in ("raise", "slightly_wrong"))
@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        ("crash", "planned", "return code is not 0"),
        ("raise", "planned", "return code is not 0"),
        ("exit", "planned", "finished is not true"),
        ("shape", "planned", "return code is not 0"),
        ("dtype", "executed", "out: shape or dtype is not the promised one"),
        ("nan", "executed", "out: holds NaN or infinity"),
        ("inf", "executed", "out: holds NaN or infinity"),
        ("scaled", "executed", "out: error is over 2 × the baseline's + tolerance"),
        ("slightly_wrong", "executed", "out: error is over 2 × the baseline's + tolerance"),
        ("not_causal", "executed", "dq: error is over 2 × the baseline's + tolerance"),
        ("no_gradient_of_k", "executed", "dk: is zero throughout"),
    ],
)
@pytest.mark.thorough_if(when=lambda fault, **_: fault != "slightly_wrong")
def test_faults_leave_a_receipt_that_does_not_pass(stand_in, tmp_path, fault, state, reason):
    path = tmp_path / "receipt.json"
    receipt = run(stand_in, fault, out=path)
    assert json.loads(path.read_text()) == receipt
    assert receipt["state"] == state
    assert receipt["execute_proof_passed"] is False
    assert reason in problems(receipt)
    assert reason not in DEVICE_CONDITIONS
    assert verify_file(path) == problems(receipt)


@pytest.mark.thorough
def test_a_hang_is_ended_and_recorded(stand_in, tmp_path):
    receipt = run(stand_in, "hang", time_limit=8.0, out=tmp_path / "receipt.json")
    (only,) = receipt["runs"]
    assert only["timed_out"] is True
    assert only["seconds"] < 60
    assert only["report"]["import_success"] is True, "what was reported before the end is kept"
    assert only["report"]["forward_success"] is False
    assert "the time limit was reached" in problems(receipt)


@pytest.mark.parametrize("fault", ["import", "absent"])
def test_a_missing_package_is_a_typed_refusal(stand_in, fault):
    if fault == "absent" and has_package("flash_attn"):
        pytest.skip("the package is here")
    receipt = run({} if fault == "absent" else stand_in, fault)
    assert receipt["refusal"]["code"] == "package_missing"
    assert ("flash_attn" if fault == "absent" else "quack") in receipt["refusal"]["reason"]
    assert "the proof was refused" in problems(receipt)


@pytest.mark.skipif(has_package("flash_attn") or torch.cuda.is_available(), reason="nothing to refuse here")
def test_the_public_function_refuses_without_the_package(tmp_path):
    proof = ki.fa4_execute_proof((1, 32, 4, 2, 16), out=tmp_path / "receipt.json")
    assert (proof.state, proof.passed, proof.refusal.code) == ("planned", False, "package_missing")
    with pytest.raises(typer.Exit) as left:
        command.fa4(seq=32, out=tmp_path / "second.json")
    assert left.value.exit_code == command.REFUSED
    assert verify_file(tmp_path / "second.json")


@pytest.mark.skipif(not has_package("flash_attn") or torch.cuda.is_available(), reason="needs flash-attn-4, no CUDA")
def test_the_real_package_compiles_for_both_architectures(tmp_path):
    proof = ki.fa4_execute_proof((2, 256, 8, 2, 64), out=tmp_path / "receipt.json")
    assert (proof.state, proof.passed, proof.refusal) == ("compiled", False, None)
    for target in proof.receipt["runs"]:
        kernels = [row["kernel"] for row in target["report"]["cubins"]]
        assert any("Forward" in k for k in kernels)
        assert any("Backward" in k for k in kernels)
        assert all(row["bytes"] > 1000 for row in target["report"]["cubins"])
    assert "state is 'compiled', not 'executed'" in proof.problems


@pytest.fixture
def good(honest):
    """The honest run, with what a Hopper would have reported of itself: to try the verifier on, and no evidence."""
    receipt = copy.deepcopy(honest)
    receipt["program"] = emit(REQUEST, "execute", "cuda")
    report = receipt["runs"][0]["report"]
    report["versions"] |= {"cuda": "13.0", "driver": "580.0"}
    report["device"] = {"type": "cuda", "name": "stand-in", "capability": [9, 0], "memory": 1}
    report["kernels"] = ["kernel_flash_fwd_sm90", "kernel_flash_bwd_sm90"]
    report["peak_memory_bytes"] = 1
    receipt["execute_proof_passed"] = True
    receipt["digest"] = digest(receipt)
    return receipt


def test_the_verifier_accepts_a_receipt_that_meets_every_condition(good, tmp_path):
    assert problems(good) == []
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(good))
    command.verify(path)


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path


def changed(receipt, path, value):
    receipt = copy.deepcopy(receipt)
    at = receipt
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return receipt


def test_no_field_can_be_changed_unnoticed(good):
    paths = list(leaves(good))
    assert len(paths) > 70
    for path in paths:
        assert problems(changed(good, path, "tampered")), path


R = ("runs", 0, "report")
LIES = [
    (("state",), "compiled"),
    (("state",), "planned"),
    (("execute_proof_passed",), "true"),
    (("execute_proof_passed",), 1),
    (("refusal",), {"code": "package_missing", "reason": ""}),
    (("schema",), "kernel_index.fa4_execute_proof/0"),
    (("program",), "print('all is well')"),
    (("request", "seed"), 1),
    (("request", "shape", "seq"), 64),
    (("request", "dtype"), "float32"),
    (("request", "shape", "kv_heads"), 3),
    (("runs",), []),
    (("runs", 0, "return_code"), 1),
    (("runs", 0, "return_code"), None),
    (("runs", 0, "return_code"), False),
    (("runs", 0, "timed_out"), True),
    ((*R, "import_success"), False),
    ((*R, "forward_success"), None),
    ((*R, "backward_success"), "yes"),
    ((*R, "finished"), False),
    ((*R, "versions", "driver"), None),
    ((*R, "versions", "flash-attn-4"), ""),
    ((*R, "device", "type"), "cpu"),
    ((*R, "device", "capability"), [7, 5]),
    ((*R, "device", "capability"), None),
    ((*R, "kernels"), []),
    ((*R, "kernels"), ["kernel_flash_fwd_sm90", "gemm"]),
    ((*R, "kernels"), ["fmha_fwd", "fmha_bwd"]),
    ((*R, "median_milliseconds"), 0),
    ((*R, "median_milliseconds"), "inf"),
    ((*R, "peak_memory_bytes"), True),
    ((*R, "numerics"), {}),
    ((*R, "numerics", "out", "shape"), [1, 32, 4, 8]),
    ((*R, "numerics", "dk", "dtype"), "float32"),
    ((*R, "numerics", "dq", "nan"), 1),
    ((*R, "numerics", "dq", "inf"), 2),
    ((*R, "numerics", "dv", "nan"), False),
    ((*R, "numerics", "out", "max_abs_error"), "nan"),
    ((*R, "numerics", "out", "max_abs_error"), 1.0),
    ((*R, "numerics", "out", "max_abs_error"), -1.0),
    ((*R, "numerics", "out", "tolerance"), 10.0),
    ((*R, "numerics", "out", "baseline_max_abs_error"), 10.0),
    ((*R, "numerics", "dv", "max_abs"), 0),
]


@pytest.mark.parametrize(("path", "value"), LIES, ids=[f"{'.'.join(map(str, p))}={v!r:.30}" for p, v in LIES])
def test_a_sealed_lie_is_refused_by_the_conditions_themselves(good, path, value):
    lie = changed(good, path, value)
    lie["digest"] = digest(lie)
    found = problems(lie)
    assert found
    assert "digest does not fit the content" not in found


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"digest": NaN}', '{"runs": 3, "request": 4}', "[" * 50_000]
)
def test_rubbish_is_refused(tmp_path, content):
    path = tmp_path / "receipt.json"
    path.write_text(content)
    assert verify_file(path)
    with pytest.raises(typer.Exit) as left:
        command.verify(path)
    assert left.value.exit_code == 1
    assert verify_file(tmp_path / "absent.json")


def test_the_program_stands_alone():
    program = emit(REQUEST, "execute", "cuda")
    assert "import kernel_index" not in program
    assert "from kernel_index" not in program
    compile(program, "program.py", "exec")
    assert program == emit(REQUEST, "execute", "cuda")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"shape": (1, 128, 4, 3, 64)}, "heads must be a multiple of kv_heads"),
        ({"shape": (0, 128, 4, 2, 64)}, "batch must be at least 1"),
        ({"shape": (1, 128, 4, 2, 60)}, "head_dim must be a multiple of 8"),
        ({"dtype": torch.float32}, "dtype must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_requests_that_no_kernel_could_serve_raise(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ki.fa4_execute_proof(**call, out=tmp_path / "receipt.json")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_found_before_the_work(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError):
        prove(REQUEST, mode="execute", device="cpu", out=blocked / "receipt.json")


def test_importing_the_library_imports_no_proof_tools():
    code = "import sys, kernel_index; print([m for m in ('flash_attn', 'cutlass', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr
