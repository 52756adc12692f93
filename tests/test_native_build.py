"""Native kernels are compiled ahead of time: no call of ``auto`` compiles, and a library is built once and whole."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.native import build
from kernel_index.core.numerics import FOR_THE_MODE
from kernel_index.core.target import cxx_compiler
from kernel_index.index.entries import ENTRIES

SOURCE = """
extern "C" void twice(const int64_t* n, const float* x, float* out) {
  for (int64_t i = 0; i < n[0]; ++i) out[i] = x[i] + x[i];
}
"""

pytestmark = pytest.mark.skipif(
    not native._has_vectors() or cxx_compiler() is None, reason="native kernels do not run here"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small source, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "twice.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """A machine on which nothing is built: the libraries that this process found are forgotten."""
    monkeypatch.setattr(build, "folders", lambda: (tmp_path / "empty",))
    for cached in (native.is_built, native.library, native._function):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (native.is_built, native.library, native._function):
        cached.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """The names of the sources that are compiled."""
    found, compile_source = [], build._compile

    def spy(source, folder):
        found.append(source.name)
        return compile_source(source, folder)

    monkeypatch.setattr(build, "_compile", spy)
    return found


def qkv(queries=512):
    return torch.randn(3, 1, queries, 2, 64, generator=torch.Generator().manual_seed(0)).unbind()


def test_auto_compiles_nothing_and_the_receipt_says_why(nothing_built, compilations):
    q, k, v = qkv()
    with ki.receipts() as log:
        out = ki.attention(q, k, v)
    assert compilations == []
    assert log[0].ran == "sdpa"
    assert dict(log[0].declined)["native"] == native.NOT_BUILT
    torch.testing.assert_close(out, ki.attention(q, k, v, backend="reference"), rtol=1e-5, atol=1e-5)


CALLS = {
    "moba_attention": lambda q, k, v: ki.moba_attention(q, k, v, block_size=64, topk=2),
    "lightning_indexer": lambda q, k, v: ki.lightning_indexer(q, k[:, :, 0], torch.ones(1, 512, 2), topk=16),
    "fused_rope_qk": lambda q, k, v: ki.fused_rope_qk(q[:, :1], k[:, :1], *torch.zeros(2, 1, 1, 1, 32)),
    "clustered": lambda q, k, v: ki.clustered_sparse_attention(
        q, k, v, config=ki.ClusteredSparseConfig(block_size=64, topk=2)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_op_compiles_by_auto(name, nothing_built, compilations):
    with torch.no_grad():
        CALLS[name](*qkv())
    assert compilations == []


def test_every_native_kernel_has_the_rule():
    tables = {names: table for entry in ENTRIES for names, table in entry.tables().items()}
    rows = {names: b for names, table in tables.items() for b in table if b.name == "native"}
    assert len(rows) > 10
    by_auto = {names: b for names, b in rows.items() if FOR_THE_MODE not in b.advice}  # auto takes the others never
    assert [names for names, b in by_auto.items() if native.NOT_BUILT not in b.advice] == []


def test_a_named_backend_builds_what_it_needs_and_auto_then_takes_it(nothing_built, compilations, caplog):
    q, k, v = qkv()
    with caplog.at_level(logging.INFO, "kernel_index"):
        ki.attention(q, k, v, backend="native")
        ki.attention(q, k, v, backend="native")
    assert compilations == ["attention.cpp"]
    assert [r.levelname for r in caplog.records if "attention.cpp" in r.message] == ["INFO"]
    with ki.receipts() as log:
        ki.attention(q, k, v)
    assert log[0].ran == "native"


def test_a_run_keeps_its_backends_when_another_process_builds(nothing_built, monkeypatch):
    q, k, v = qkv()
    with ki.receipts() as log:
        ki.attention(q, k, v)
        monkeypatch.setattr(build, "find", lambda source: source)
        ki.attention(q, k, v)
    assert [r.ran for r in log] == ["sdpa", "sdpa"]


def test_a_built_library_is_found_again(source, compilations, caplog):
    with caplog.at_level(logging.INFO, "kernel_index"):
        first, second = build.build(source), build.build(source)
    assert first.library == second.library
    assert first.seconds > 0 == second.seconds
    assert compilations == ["twice.cpp"]
    assert len(caplog.records) == 1
    x, out = torch.arange(3.0), torch.empty(3)
    native.call(source, "twice", (3,), (), x, out)
    assert out.tolist() == [0.0, 2.0, 4.0]


def test_another_source_has_another_library(source, compilations):
    first = build.build(source)
    source.write_text(SOURCE.replace("x[i] + x[i]", "2 * x[i]"))
    assert build.build(source).library != first.library
    assert compilations == ["twice.cpp"] * 2


@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty"])
@pytest.mark.thorough_if(when=lambda damage: damage != "one byte")
def test_a_damaged_library_is_built_again(damage, source, compilations):
    library = build.build(source).library
    content = library.read_bytes()
    middle = len(content) // 2
    library.unlink()  # a new file: this process may have loaded the old one
    library.write_bytes(
        {"truncated": content[:middle], "empty": b"", "one byte": content[:middle] + b"\xff" + content[middle + 1 :]}[
            damage
        ]
    )
    assert build.find(source) is None
    assert build.build(source).library.read_bytes() == content
    assert compilations == ["twice.cpp"] * 2


@pytest.mark.thorough
def test_processes_that_start_together_build_once(source, tmp_path):
    code = (
        "import sys, pathlib; from kernel_index.core.native import build; "
        "print(build.build(pathlib.Path(sys.argv[1])).seconds > 0)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert sorted(p.communicate()[0].strip() for p in running) == ["False", "False", "True"]


def test_a_cache_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    built = build.build(source)
    assert built.library.parent.parent == tmp_path
    assert build.find(source) == built.library


def test_a_folder_that_others_can_write_to_is_not_trusted(source, tmp_path):
    library = build.build(source).library
    library.parent.chmod(0o777)
    assert build.find(source) is None


def test_without_a_compiler(source, compilations, nothing_built, monkeypatch):
    for module in (native, build):
        name = "has_cxx_compiler" if module is native else "cxx_compiler"
        monkeypatch.setattr(module, name, lambda: None)
    with pytest.raises(ki.Ineligible, match="needs a C\\+\\+ compiler"):
        ki.attention(*qkv(), backend="native")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        build.build(source)
    assert native.build_all() == []


def test_what_is_built_needs_no_compiler(monkeypatch):
    assert len(native.build_all()) == len(build.sources())
    monkeypatch.setattr(native, "has_cxx_compiler", lambda: False)
    with ki.receipts() as log:
        ki.attention(*qkv())
    assert log[0].ran == "native"


def test_a_source_that_does_not_compile_says_what_the_compiler_said(source):
    source.write_text("extern int x = ;")
    with pytest.raises(RuntimeError, match=r"twice.cpp was not compiled by (?s:.*)error: expected"):
        build.build(source)
    source.write_text('extern "C" void nowhere(); extern "C" void call(const int64_t*) { nowhere(); }')
    with pytest.raises(build.CannotBuild, match="nowhere"):
        build.build(source)
    assert not list(build.folders()[0].glob("*.so"))


def test_sources_are_in_the_package_and_few_headers_are_read():
    """A header of PyTorch's costs each source 2 s."""
    assert {path.name for path in build.sources()} >= {"attention.cpp", "rows.cpp", "routing.cpp"}
    for source in build.sources():
        assert "ATen" not in build._code(source)
        assert "torch/" not in build._code(source)


def test_a_compiler_that_fails_is_one_line_for_who_can_do_without(source, nothing_built, monkeypatch, caplog, tmp_path):
    """A g++ that does not know the flags; ``sources`` of the package are not built for it."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'bad value for -march=' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(build, "cxx_compiler", lambda: str(broken))
    native.build_all_or_warn()
    assert [r.getMessage().startswith("no native kernels: ") for r in caplog.records] == [True]
    assert "\n" not in caplog.records[0].getMessage()
    with pytest.raises(build.CannotBuild, match="bad value"):
        native.build_all()


def test_sources_are_read_as_utf8_whatever_the_locale(nothing_built):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = "import torch, kernel_index as ki; q = torch.randn(1, 512, 4, 64); print(ki.attention(q, q, q).shape)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_relative_cache_folder_and_no_temporary_one_are_no_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.folders()[0] == tmp_path / ".cache" / "kernel_index" / "native"

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(build.tempfile, "gettempdir", nowhere)
    assert len(build.folders()) == 1


def test_a_killed_build_leaves_nothing_for_good(source):
    folder = build.build(source).library.parent
    left = folder / f".draft-{source.stem}-killed"
    left.mkdir()
    source.write_text(source.read_text() + "\n")
    build.build(source)
    assert not left.exists()


def test_loading_what_another_process_built_changes_no_answer(source, nothing_built, monkeypatch):
    other = source.with_name("other.cpp")
    other.write_text(source.read_text())
    assert not native.is_built(other)
    build.build(source)
    build.build(other)  # the other process
    native.library.__wrapped__(source)
    assert not native.is_built(other)


@pytest.mark.native
def test_a_cpu_without_products_of_bfloat16_is_declined(monkeypatch):
    """oneDNN would end the process there: AVX-512 came before AVX512_BF16."""
    q = torch.randn(1, 128, 2, 16).bfloat16()
    monkeypatch.setattr(native, "has_bfloat16_products", lambda: False)
    with pytest.raises(ki.Ineligible) as error:
        ki.attention(q, q, q, backend="native")
    assert native.NO_BFLOAT16 in str(error.value)
    assert ki.attention(q, q, q).isfinite().all()
    assert ki.attention(q.float(), q.float(), q.float(), backend="native").isfinite().all()
