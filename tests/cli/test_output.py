"""What is printed: brackets are text, any encoding will do, and output that cannot be written is one error line."""

import json
import os
import subprocess
import sys

import pytest

from kernel_index.cli import commands, streams
from kernel_index.core import native, terminal
from kernel_index.lm import commands as lm

FOLDERS = ["r3[red]", "r[/b]", "r:cat:"]


def shell(command: str, **environment: str):
    """``kernel-index`` and its redirections."""
    start = f'exec "{sys.executable}" -m kernel_index {command}'
    return subprocess.run(["sh", "-c", start], capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_folder_is_text_and_not_markup(name, tmp_path, monkeypatch, capsys):
    data = tmp_path / name / "data"
    data.mkdir(parents=True)
    (data / "one.txt").write_text("To be, or not to be.\n" * 20)
    monkeypatch.chdir(tmp_path)
    trainer = lm.Trainer.start(lm.RunConfig.from_preset("nano", data=str(data), steps=1), tmp_path / name)
    lm._introduce(trainer)
    printed = capsys.readouterr().out
    assert f"Data: {data}, " in printed
    assert f"run folder: {tmp_path / name}\n" in printed


@pytest.mark.parametrize("name", FOLDERS)
def test_a_cache_folder_is_text_and_not_markup(name, tmp_path, monkeypatch, capsys):
    library = tmp_path / name / "library.so"
    monkeypatch.setattr(native, "machine_why_not", lambda: None)
    monkeypatch.setattr(native, "build_all", lambda: [native.build.Built(library, library, 1.0)])
    commands.build_command()
    assert capsys.readouterr().out.endswith(f": {library.parent}\n")


@pytest.mark.parametrize("to", [terminal.console, terminal.errors])
def test_no_string_is_markup(to):
    for text in (*FOLDERS, "[bold]x[/]"):
        with to.capture() as printed:
            to.print(text)
        assert printed.get() == f"{text}\n"


@pytest.mark.thorough_if(when=lambda command, encoding: (command, encoding) != ("list", "ascii"))
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize("command", ["list", "show attention", "doctor"])
def test_a_stream_that_lacks_characters(command, encoding):
    done = shell(command, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert command != "list" or "reference +" in " ".join(text.split()).replace("\N{NO-BREAK SPACE}", " ")
    as_json = shell(f"{command} --json", PYTHONIOENCODING=encoding)
    assert as_json.returncode == 0, as_json.stderr
    assert as_json.stdout.isascii()
    assert json.loads(as_json.stdout)


def test_json_in_utf8_keeps_its_characters():
    done = shell("show attention --json", PYTHONIOENCODING="utf-8")
    assert not done.stdout.isascii()
    assert json.loads(done.stdout) == json.loads(shell("show attention --json", PYTHONIOENCODING="ascii").stdout)


def test_a_name_that_is_not_utf8_is_printed_as_it_is():
    code = "from kernel_index.cli import streams; streams.run(lambda: print('caf\\udce9 \\u2713'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, b"caf\xe9 +\n")


@pytest.mark.thorough_if(when=lambda command: command not in ("list", "--help"))
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["list", "show attention --json", "doctor", "presets", "--version", "--help"])
def test_a_full_disk_is_one_line(command):
    done = shell(f"{command} >/dev/full")
    assert (done.returncode, done.stderr) == (streams.FAILED, b"error: [Errno 28] No space left on device\n")


@pytest.mark.thorough_if(when=lambda command: command != "list")
@pytest.mark.parametrize("command", ["list", "show attention --json"])
@pytest.mark.thorough
def test_a_closed_output_is_one_line(command):
    done = shell(f"{command} >&-")
    assert (done.returncode, done.stderr) == (streams.FAILED, b"error: the standard output is closed\n")
    assert shell(f"{command} 2>&- >&-").returncode == streams.FAILED


def test_a_reader_that_ends_early_is_told_nothing():
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m kernel_index show attention --json | true'], capture_output=True
    )
    assert done.stderr == b""


@pytest.mark.thorough
def test_wrong_use_is_said_once_where_nothing_can_be_written():
    done = shell("show nothing_like_it >/dev/full")
    assert done.returncode == terminal.WRONG_USE
    assert done.stderr.count(b"\n") == 1


def test_doctor_knows_the_variables_that_are_read():
    said = shell("doctor", KERNEL_INDEX_NUMERICS="invariant", KERNEL_INDEX_NUMERIC="1", COLUMNS="200").stdout.decode()
    assert "KERNEL_INDEX_NUMERIC" in said
    assert "did you mean KERNEL_INDEX_NUMERICS?" in said
    assert "KERNEL_INDEX_STRICT?" not in said
