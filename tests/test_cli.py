"""The ``kernel-index`` command, and the index that it prints."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import kernel_index
from kernel_index.cli import commands
from kernel_index.cli.main import cache_folder
from kernel_index.core import target
from kernel_index.core.dispatch import Backend, always
from kernel_index.core.target import machine_rules, machine_why_not
from kernel_index.core.testing import Maker, suites
from kernel_index.index import entries
from kernel_index.index.entries import ENTRIES
from kernel_index.index.rule_sentences import sentences

SEED = {  # the document that the project implements, by family
    "Attention": """attention_validity_prefix causal_windowing_predicate doc_window_mask exact_token_sparse_telemetry
        fused_rope_qk dense_fa4_execute_proof dense_fa4_kvcache_decode""",
    "Sparse staging": """hierarchical_block_expansion triton_row_gather triton_row_gather_pair moba_block_sparse_decode
        union_selection_query_mask clustered_sparse_three_phase exact_mask_contract_cache""",
    "Block boundary": "fused_bias_dropout_add fused_residual_add_rms_norm",
    "Experts and activations": "fused_relu_squared",
    "Multi-stream fusion": "mhc_fused_static",
    "MLA": "fused_mla_projection",
    "Loss": "fused_linear_cross_entropy_chunked",
}
ROOT = Path(kernel_index.__file__).parent


def run(*arguments: str):
    return CliRunner().invoke(commands.app, list(arguments))


def in_a_process(*arguments: str, code: str | None = None, **environment: str):
    env = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")}
    start = ["-m", "kernel_index.cli"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments], env=env | environment, cwd=ROOT.parent, capture_output=True, text=True
    )


def test_the_twenty_entries():
    """The seed's, in its order; the others follow them."""
    assert tuple(SEED) == entries.FAMILIES[: len(SEED)]
    for family, names in SEED.items():
        assert [e.name for e in ENTRIES if e.family == family and e.seed] == names.split()
    assert sum(len(names.split()) for names in SEED.values()) == 20
    assert [e.seed for e in ENTRIES] == sorted((e.seed for e in ENTRIES), reverse=True)
    with pytest.raises(FrozenInstanceError):
        ENTRIES[0].name = "other"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_an_entry_is_what_the_tree_says(entry):
    assert (ROOT / entry.folder / "api.py").is_file()
    if entry.implemented:
        assert all(entry.docstrings().values())
        assert all(entry.users().values()), "it is used where the index says so"
        for names, table in entry.tables().items():
            assert table[-1].name == ("xla" if names[0].startswith("jax.") else "reference")
            for backend in table:
                assert backend.machine == machine_rules().get(backend.name)
                plain = backend.name in ("reference", "xla", "chunked", "eager", "parts")  # they take every call
                assert plain or backend.rules, f"{backend.name} states no rule"


def test_the_index_shows_each_function_the_table_that_it_chooses_from():
    """In the order of ``auto``, without what its module imports for other functions."""
    shown = {n: [b.name for b in table] for e in ENTRIES for names, table in e.tables().items() for n in names}
    for suite in suites():
        if suite.op in shown:
            found = kernel_index.explain(suite.function, **suite.sized(Maker(torch.float32), 8))
            assert shown[suite.op] == list(found.verdicts), suite.op
    named = {n for e in ENTRIES for n, text in e.signatures().items() if "backend=" in text}
    assert named - {"resolve_block_sparse_backend", "exact_mask_key"} <= set(shown), "which take a name to read or keep"
    assert shown["clustered_route"] == ["triton", "native", "chunked", "reference"]
    assert shown["jax.attention"] == ["pallas", "xla"]


def test_every_public_function_is_in_the_index():
    """But those of the core, which belong to every kernel."""
    functions = {n: f for n in kernel_index.__all__ if inspect.isfunction(f := getattr(kernel_index, n))}
    own = {n for n, f in functions.items() if not f.__module__.startswith("kernel_index.core.")}
    assert own <= {name for e in ENTRIES for name in e.functions}
    named = [name for e in ENTRIES for name in e.functions]
    assert len(named) == len(set(named)), "a function belongs to one entry"
    for name in own:
        assert name in entries.find(name).functions


def test_a_backend_that_no_machine_rule_speaks_of_runs_anywhere():
    assert machine_why_not("invented") is None
    assert machine_why_not("sharded") == machine_rules()["sharded"] is not None


def test_an_entry_without_its_folder_is_not_implemented():
    absent = entries.entry("x", "Loss", "kernels/loss/absent", "absent_loss", "Nothing.", "nn.Absent")
    assert not absent.implemented
    assert absent.missing() == ("absent_loss",)
    assert (absent.tables(), absent.backends()) == ({}, ())
    assert (absent.docstrings(), absent.users()) == ({}, {"nn.Absent": False})


def test_a_function_that_is_not_exported_is_missing():
    half = entries.entry("x", "Experts", "kernels/experts/x", "fused_relu_squared fused_relu_cubed", "", "")
    assert half.missing() == ("fused_relu_cubed",)
    assert not half.implemented


RULE = "needs a device of rule"


def _inner_rule(x) -> str | None:
    """This docstring is not a rule."""
    if x == "a comparison is not a rule":
        return "needs an inner rule"
    return None


def _outer_rule(x) -> str | None:
    rule = _inner_rule(x)
    if rule is None:
        rule = RULE if x else "needs the other thing"
    return rule


def test_rules_are_read_from_the_predicates(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__name__", "kernel_index.pretended")
    for function in (_inner_rule, _outer_rule):
        monkeypatch.setattr(function, "__module__", "kernel_index.pretended")
    assert set(sentences(_outer_rule)) == {"needs an inner rule", RULE, "needs the other thing"}
    assert sentences(always) == ()
    assert sentences(Backend("n", len, len).why_not) == ()


def test_list():
    result = run("list")
    assert result.exit_code == 0
    for family, names in SEED.items():
        assert family in result.output
        for name in names.split():
            assert name in result.output
    line = next(line for line in result.output.splitlines() if "fused_relu_squared" in line)
    assert line.split()[:2] == ["✓", "fused_relu_squared"]
    assert "inductor ✓" in line
    assert "reference ✓" in line
    for line in ("  ki.attention_with_lse", "  ki.lightning_indexer ", "  ki.jax.attention "):
        assert line in result.output, "what users call, below the entry's name"
    assert "20 of 20 entries implemented" in result.output
    assert "Beside these: dense_attention" in result.output


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_a_backend_and_its_mark_stay_together(monkeypatch, columns):
    monkeypatch.setattr(commands, "console", Console(width=columns))
    lines = run("list").output.splitlines()
    assert not [line for line in lines if line.strip() in ("✓", "✗") or line.strip().startswith(("✓ ✓", "✗  "))]
    assert not [line for line in lines if "…" in line]


def test_list_marks_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr(target, "has_inductor_compiler", lambda: False)
    result = run("list")
    line = next(line for line in result.output.splitlines() if "fused_relu_squared" in line)
    assert "inductor ✗" in line
    assert f"✗ inductor: {target.NO_GXX}" in " ".join(result.output.split())
    shown = {e["name"]: e for e in json.loads(run("list", "--json").output)}
    state = {"name": "inductor", "available": False, "reason": target.NO_GXX}
    assert state in shown["fused_relu_squared"]["backends"][0]["backends"]


def test_list_json():
    shown = json.loads(run("list", "--json").output)
    assert [e["name"] for e in shown] == [e.name for e in ENTRIES]
    assert sum(e["seed"] for e in shown) == 20
    relu = next(e for e in shown if e["name"] == "fused_relu_squared")
    assert relu["implemented"] is True
    assert relu["functions"] == ["fused_relu_squared"]
    (table,) = relu["backends"]
    assert table["functions"] == ["fused_relu_squared"]
    assert [b["name"] for b in table["backends"]] == ["triton", "inductor", "reference"]


@pytest.mark.parametrize("name", ["fused_rope_qk", "rope_tables"])
def test_show(name):
    """By the entry's name or by one of its functions'."""
    result = run("show", name)
    assert result.exit_code == 0
    assert "ki.fused_rope_qk(q, k, cos, sin=None, *, interleaved=False, q_weight=None," in result.output
    assert kernel_index.fused_rope_qk.__doc__.splitlines()[0] in result.output
    assert "[1 or B, T, 1, R/2]" in result.output, "brackets are text, not markup"
    assert "    declines: cos or sin needs a gradient: only the reference computes it" in result.output
    assert "    auto passes over it: too small for a compiled region to pay" in result.output
    assert "kernel_index.nn.TransformerBlock" in result.output


@pytest.mark.parametrize("name", ["attention", "dense_attention"])
def test_show_finds_what_users_call(name):
    result = run("show", name)
    assert result.exit_code == 0
    assert kernel_index.attention.__doc__.splitlines()[0] in result.output


@pytest.mark.parametrize("name", ["bench", "new"])
def test_tools_of_developers_are_no_commands_of_the_package(name):
    result = run(name)
    assert result.exit_code == 2
    assert f"No such command '{name}'" in result.output


def test_show_json():
    shown = json.loads(run("show", "fused_relu_squared", "--json").output)
    assert shown["contract"]["fused_relu_squared"].startswith("Squared ReLU")
    rules = shown["rules"]["fused_relu_squared"]
    assert rules["reference"] == {"declines": [], "auto_declines": []}
    assert "needs CPU tensors" in rules["inductor"]["declines"]


def test_show_says_what_is_not_implemented(monkeypatch):
    planned = entries.entry("planned", "Loss", "kernels/loss/planned", "planned_loss", "A plan.", "nn.Planned")
    monkeypatch.setattr(entries, "ENTRIES", (planned,))
    result = run("show", "planned")
    assert result.exit_code == 0
    assert "Not implemented yet: planned_loss" in result.output
    assert "kernel_index.nn.Planned (not yet)" in result.output


@pytest.mark.parametrize(("typo", "near"), [("fused_rope", "fused_rope_qk"), ("relu_squared", "fused_relu_squared")])
def test_an_unknown_entry_suggests_the_nearest(typo, near):
    result = run("show", typo)
    assert result.exit_code != 0
    assert result.output.count("\n") == 1
    assert f"no entry is called {typo!r}" in result.output
    assert near in result.output


def test_an_unknown_entry_without_a_neighbour():
    result = run("show", "zzzzzzzz", "--json")
    assert result.exit_code != 0
    assert "`kernel-index list` names them all" in result.output


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0
    for fact in (
        "python",
        "torch",
        "C++ compiler",
        "CPU capability",
        "CUDA",
        "triton",
        "flash-attn-4",
        "jax",
        "libtpu",
    ):
        assert fact in result.output
    for name, reason in machine_rules().items():
        assert f"{'✗' if reason else '✓'} {name}" in result.output
        assert (reason or "") in " ".join(result.output.split())  # lines are broken where the terminal ends


def test_native_needs_vectors(monkeypatch):
    monkeypatch.setattr(target, "has_vectors", lambda: False)
    assert "✗ native: needs a CPU with AVX2" in run("doctor").output


def test_doctor_json(monkeypatch):
    monkeypatch.setenv("KERNEL_INDEX_BACKEND", "reference")
    report = json.loads(run("doctor", "--json").output)
    assert {b["name"]: b["reason"] or None for b in report["backends"]} == machine_rules()
    assert report["facts"]["variables"]["KERNEL_INDEX_BACKEND"] == "reference"
    assert set(report["facts"]["packages"]) >= {"triton", "flash-attn-4", "jax", "libtpu"}


def test_commands_of_other_folders_are_listed_and_imported_late():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("list", "show", "doctor", *commands.ELSEWHERE):
        assert name in result.output
    for name in commands.ELSEWHERE:
        assert run(name, "--help").exit_code == 0
    code = (
        "import sys; sys.argv[1:] = ['list']\n"
        "from kernel_index.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('kernel_index.lm.train', 'torch._dynamo', 'torch._inductor.config', 'matplotlib', 'jax',"
        " 'triton') if m in sys.modules])"
    )
    assert in_a_process(code=code).stdout.splitlines()[-1] == "[]"


def test_a_real_process_keeps_its_cache_in_the_users_folder(tmp_path):
    result = in_a_process("doctor", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    expected = str(tmp_path / "kernel_index" / "inductor")
    facts = json.loads(result.stdout)["facts"]
    assert facts["variables"]["TORCHINDUCTOR_CACHE_DIR"] == expected
    assert facts["cache"].startswith(expected)


def test_the_cache_folder_that_the_user_chose_is_kept(tmp_path):
    result = in_a_process("doctor", "--json", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert json.loads(result.stdout)["facts"]["variables"]["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_the_cache_folder_without_a_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "kernel_index" / "inductor"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_one_line_when_the_extra_is_missing(package):
    code = f"import sys; sys.modules[{package!r}] = None; from kernel_index.cli.main import main; main()"
    result = in_a_process(code=code)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.strip() == f"kernel-index needs the {package} package: pip install 'kernel-index[cli]'"


@pytest.mark.parametrize("arguments", [(), ("list",)])
@pytest.mark.parametrize("home", ["", "/proc/nothing"], ids=["no home", "not writable"])
@pytest.mark.thorough
def test_without_a_writable_home_pytorchs_cache_is_used(tmp_path, home, arguments):
    """One line, and the command runs."""
    code = (
        "import os, pwd, sys; os.environ.pop('HOME', None); home = sys.argv.pop(1)\n"
        "def no_user(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = no_user\n"
        "if home: os.environ['HOME'] = home\n"
        "from kernel_index.cli.main import main, use_cache_folder\n"
        "use_cache_folder() if len(sys.argv) == 1 else main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, home, *arguments],
        env={k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "HOME")},
        cwd=ROOT.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("kernel-index: compiled kernels go to PyTorch's cache folder")


@pytest.mark.parametrize("module", ["kernel_index", "kernel_index.cli"])
def test_the_package_is_the_command_too(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], cwd=ROOT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"kernel-index {kernel_index.__version__}\n")


def test_doctor_names_variables_that_nothing_reads(monkeypatch):
    monkeypatch.setenv("KERNEL_INDEX_BACKEND_ATENTION", "sdpa")
    monkeypatch.setenv("KERNEL_INDEX_BACKEND_ATTENTION", "sdpa")
    monkeypatch.setenv("KERNEL_INDEX_STRCT", "1")
    assert json.loads(run("doctor", "--json").output)["facts"]["not read"] == {
        "KERNEL_INDEX_BACKEND_ATENTION": "did you mean KERNEL_INDEX_BACKEND_ATTENTION?",
        "KERNEL_INDEX_STRCT": "did you mean KERNEL_INDEX_STRICT?",
    }
    assert "did you mean KERNEL_INDEX_STRICT?" in run("doctor").output


@pytest.mark.parametrize("columns", [80, 160])
def test_presets_are_not_cut(monkeypatch, columns):
    from kernel_index.lm import commands as lm

    monkeypatch.setattr(lm, "console", Console(width=columns))
    shown = run("presets").output
    assert "…" not in shown
    for number in ("63,289,9", "MAEMSEML", "bfloat16", "3,554,776"):
        assert number in shown
