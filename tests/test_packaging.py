"""What an installation with PyTorch and nothing else can do, and what an exported entry does on its own."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kernel_index as ki
from kernel_index.cli.commands import ELSEWHERE, app
from kernel_index.core.target import has_package, machine_rules
from kernel_index.index.entries import ENTRIES
from kernel_index.index.entry import ROOT
from kernel_index.integrations.kernels_hub import BACKENDS, export

SETTINGS = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]


def test_pytorch_and_what_it_warns_without_are_the_only_requirements_and_types_are_shipped():
    assert [re.split(r"\W", d)[0] for d in PROJECT["dependencies"]] == ["torch", "numpy"]
    assert (ROOT / "py.typed").is_file()


def test_the_wheel_holds_the_package_alone():
    """No tools, benchmarks or docs; and no command of the package needs them."""
    assert SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["kernel_index"]}
    assert {place.partition(".")[0] for place in ELSEWHERE.values()} == {"kernel_index"}


def test_every_file_of_the_package_is_python_or_said_to_be_shipped():
    """Hatchling ships what git tracks below the package: a data file that is missing there would be missing here."""
    listed = subprocess.run(["git", "ls-files", "kernel_index"], cwd=ROOT.parent, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    kinds = {Path(name).suffix for name in listed.stdout.split()}
    assert kinds <= {".py", ".md", ".j2", ".typed", ".json", ".cpp", ".h"}


def test_a_rule_about_a_missing_package_holds_the_command():
    rules = [r for e in ENTRIES for table in e.tables().values() for b in table for r in b.rules] + [
        r for r in machine_rules().values() if r
    ]
    about = [r for r in rules if re.search(r"needs the \S+ package", r)]
    assert about
    assert [r for r in about if not re.search(r"needs the (\S+) package \(pip install \1\)", r)] == []


WITHOUT_EXTRAS = """
import sys
for name in ("transformers", "triton", "jax", "typer", "rich", "flash_attn", "safetensors", "accelerate"):
    sys.modules[name] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if sys.modules.get(name, 0) is None else real(name, *rest)
import torch, kernel_index as ki
x = torch.ones(3)
assert ki.explain("fused_relu_squared", x).verdicts["triton"] == "needs the triton package (pip install triton)"
try:
    ki.transformers.apply(torch.nn.Linear(1, 1))
except ImportError as error:
    print(type(error).__name__, error)
from kernel_index.cli.main import main
main()
"""


def test_missing_extras_are_typed_reasons_with_the_command():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True)
    assert done.stdout.strip() == "MissingExtra this needs the transformers package: pip install 'kernel-index[hf]'"
    assert done.stderr.strip() == "kernel-index needs the typer package: pip install 'kernel-index[cli]'"
    assert done.returncode == 1


# One entry for the kernels loader

LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch
sys.modules["kernel_index"] = None  # a loaded kernel needs PyTorch and nothing else
for folder in sys.argv[1:]:
    build = Path(folder, "build", "torch-cpu")  # the code of the others is the same
    identity = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identity, build / "__init__.py")
    module = sys.modules[identity] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(callable(getattr(module, name)) for name in module.__all__)
    if hasattr(module, "fused_relu_squared"):
        x = torch.tensor([-1.0, 2.0], requires_grad=True)
        with module.receipts() as log:
            y = module.fused_relu_squared(x, backend="triton")
        y.sum().backward()
        assert (y.tolist(), x.grad.tolist(), log[0].ran) == ([0.0, 4.0], [0.0, 4.0], "triton")
        assert hasattr(torch.ops, identity)
        assert module.explain("fused_relu_squared", x).op == "fused_relu_squared"
        with module.receipts() as log, module.force("reference", "fused_relu_squared"):
            module.fused_relu_squared(x)
        assert (log[0].ran, log[0].forced_by) == ("reference", "ki.force")
        assert log.versions["torch"] == torch.__version__
    if hasattr(module, "clustered_sparse_attention"):
        q, k = torch.randn(1, 64, 4, 16), torch.randn(1, 64, 2, 16)
        attend = module.clustered_sparse_attention
        call = {"config": module.ClusteredSparseConfig(block_size=16, topk=2), "mask": module.MaskContract()}
        expected = attend(q, k, k, **call, backend="reference")
        for backend, rule in module.explain(attend, q, k, k, **call).verdicts.items():
            if rule is None:  # the C++ sources of a native kernel come along
                torch.testing.assert_close(attend(q, k, k, **call, backend=backend), expected)
print("loaded")
"""


@pytest.mark.skipif(not has_package("triton"), reason="needs the triton package")
def test_every_entry_can_be_laid_out_and_loaded_without_the_package(tmp_path):
    entries = [e for e in ENTRIES if e.implemented]
    folders = []
    for entry in entries:
        builds = export(entry.name, tmp_path / entry.name)
        assert [b.name for b in builds] == [f"torch-{b}" for b in BACKENDS]
        folders.append(str(tmp_path / entry.name))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", LOAD, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == "loaded", done.stderr[-2000:]
    assert len(entries) > 10


def test_the_kernels_loader_takes_it(tmp_path):
    kernels = pytest.importorskip("kernels")
    export("fused_relu_squared", tmp_path / "repository")
    module = kernels.get_local_kernel(tmp_path / "repository", backend="cpu")
    assert torch.equal(module.fused_relu_squared(torch.tensor([-1.0, 3.0])), torch.tensor([0.0, 9.0]))


def test_the_metadata_says_what_the_loader_asks(tmp_path):
    (build, *_) = export("fused_rope_qk", tmp_path / "r", version=3)
    found = json.loads((build / "metadata.json").read_text())
    assert found.pop("id").startswith("_fused_rope_qk_cpu_")
    assert found == {
        "name": "fused-rope-qk",
        "version": 3,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("no_such_entry", 1, "name must be that of an implemented entry of the index, got 'no_such_entry'"),
        ("fused_rope_qk", 0, "version must be a positive integer, got 0"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path, name, version, message):
    with pytest.raises(ValueError, match=message):
        export(name, tmp_path / "r", version)
    assert not (tmp_path / "r").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    result = CliRunner().invoke(app, ["export", "fused_rope_qk", str(tmp_path)])
    assert result.exit_code == 2
    assert "folder must be empty or new" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_versions_are_recorded(tmp_path):
    """The package's own version is that of its metadata, and a proof names what it ran on."""
    from importlib.metadata import version

    assert ki.__version__ == version("kernel-index")
    with ki.receipts() as log:
        ki.fused_relu_squared(torch.ones(1))
    assert log.versions["kernel-index"] == ki.__version__
    assert log.versions["torch"] == torch.__version__
    arguments = ["prove", "numerics", "--op", "fused_relu_squared", "--backend", "reference", "--quick", "--json"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "proof.json")])
    assert result.exit_code == 0, result.output
    versions = json.loads((tmp_path / "proof.json").read_text())["versions"]
    assert versions["kernel-index"] == ki.__version__
    assert versions["torch"] == torch.__version__
    assert ("triton" in versions) == has_package("triton")
    assert versions["python"] == sys.version.split()[0]
