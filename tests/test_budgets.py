"""The budgets hold, and each check can fail."""

import subprocess
import sys

import pytest

from tests import budgets


def test_the_project_keeps_its_budgets():
    assert budgets.problems() == []


def found(source: str, name: str = "kernel_index/kernels/loss/module.py") -> list[str]:
    return [what for _, what in budgets.check_python(name, source)]


def function(lines: int, *, head: str = "def f():", docstring: int = 0) -> str:
    documented = ['    """One line.', *["    Another."] * (docstring - 2), '    """'] if docstring else []
    return "\n".join([head, *documented, *["    x = 1"] * (lines - 1)]) + "\n"


def test_functions():
    assert found(function(60)) == []
    assert found(function(61)) == ["f has 61 lines, at most 60 in a function"]
    assert found(function(61, head="async def f():"))
    assert found("class A:\n    def f(self):\n" + "        x = 1\n" * 60)
    assert found(function(60, docstring=40)) == [], "a contract may be as long as it needs to be"
    assert found(function(61, docstring=40))


@pytest.mark.parametrize("decorator", ["@triton.jit", "@triton.jit(noinline=True)", "@jit"])
def test_device_kernels(decorator):
    kernel = f"{decorator}\n{function(150)}"
    assert found(kernel) == []
    assert found(f"{decorator}\n{function(151)}") == ["f has 151 lines, at most 150 in a device kernel"]
    assert found(f"@functools.cache\n{function(61)}")


def test_files():
    assert found("x = 1\n" * 400) == []
    assert found("x = 1\n" * 401) == ["401 lines, at most 400 in a file"]
    assert found("x = 1\n" * 400 + "x = 1") == ["401 lines, at most 400 in a file"]
    assert found("", "kernel_index/kernels/loss/utils.py") == ["name the file after what it holds, not utils.py"]


def test_parameters():
    twelve = ", ".join(f"a{i}" for i in range(12))
    assert found(f"def f(self, {twelve}, *, backend): ...") == []
    assert found(f"def f({twelve}, *, b): ...") == ["f has 13 parameters, at most 12 in a public function"]
    assert found(f"def _f({twelve}, *, b): ...") == []
    assert found(f"@triton.jit\ndef f({twelve}, b): ...") == []


@pytest.mark.parametrize(
    "handler",
    [
        "except:",
        "except Exception:",
        "except BaseException as error:",
        "except (ValueError, Exception):",
        "except builtins.Exception:",
    ],
)
def test_broad_handlers(handler):
    assert found(f"try:\n    x = 1\n{handler}\n    raise\n") == ["names no exception: catch what can be expected here"]


def test_constants_have_one_value():
    assert found("A, B = 1, 2\nC: int = 3\nA = 4\n") == ["A has a second value"]
    assert found("x = 1\nx = 2\nA = 1\ndef f():\n    A = 2\n") == []
    assert found("A = {}\nA['x'] = 1\nA.y = 2\n") == []


def test_narrow_handlers():
    assert found("try:\n    x = 1\nexcept (ValueError, OSError):\n    pass\n") == []
    assert found("with contextlib.suppress(ValueError):\n    x = 1\n") == []
    assert found("with contextlib.suppress(ValueError, Exception):\n    x = 1\n") == ["suppresses every exception"]


def test_the_one_handler_that_may_catch_everything_raises_again():
    source = "def {}(self):\n    try:\n        x = 1\n    except BaseException:\n        {}\n"
    assert found(source.format("run", "raise"), "kernel_index/core/dispatch.py") == []
    assert found(source.format("run", "pass"), "kernel_index/core/dispatch.py")
    assert found(source.format("run", "raise ValueError"), "kernel_index/core/dispatch.py")
    assert found(source.format("other", "raise"), "kernel_index/core/dispatch.py")
    assert found(source.format("run", "raise"), "kernel_index/core/target.py")


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("pip install --index" + "-url https://example.org/x", "package registry"),
        ("see https://py" + "pi.org/project/torch", "package registry"),
        ("https://mirror.example.org/sim" + "ple/torch", "package registry"),
        ("cd /ho" + "me/someone/kernels", "path of one machine"),
        ("open('/wo" + "rk/main/x')", "path of one machine"),
        ('cache = "/tm' + 'p/cache"', "path of one machine"),
        ("x = 1  # TO" + "DO later", "work undone"),
        ("#!/usr/bin/env bash", None),
        ("read /proc/self/status", None),
        ("kernel_index/data/rows and ~/wo" + "rk/rows and ./tm" + "p/rows", None),
        ("the simple way, pip install kernel-index[cli]", None),
    ],
)
def test_text(tmp_path, text, breach):
    path = tmp_path / "file.py"
    path.write_text(text + "\n")
    whats = [what for _, what in budgets.check_text(path)]
    assert len(whats) == (breach is not None)
    assert breach is None or breach in whats[0]


def test_the_script_says_where_and_fails(tmp_path):
    (tmp_path / "kernel_index").mkdir()
    (tmp_path / "kernel_index" / "utils.py").write_text("")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert budgets.problems(tmp_path) == ["kernel_index/utils.py:1: name the file after what it holds, not utils.py"]
    script = (
        "import sys, pathlib; from tests import budgets; sys.exit(bool(budgets.problems(pathlib.Path(sys.argv[1]))))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=budgets.ROOT).returncode == 1


def test_the_script_needs_neither_pytorch_nor_the_package():
    script = "import sys; sys.modules['torch'] = sys.modules['kernel_index'] = None; import tests.budgets"
    subprocess.run([sys.executable, "-c", script], cwd=budgets.ROOT, check=True)
