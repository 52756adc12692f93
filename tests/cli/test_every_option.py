"""Every command and every option: help names a default, and a value of the wrong kind is wrong use, exit status 2."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from kernel_index.cli import commands
from kernel_index.core.target import has_package
from kernel_index.lm.config import PRESETS

WIDE = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}
FREE = {"--prompt"}
"""Options for which every text is right."""
PATHS = {"out", "recorded", "receipt", "checkpoint", "folder"}


def walk(command, path=()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every command below one, with the words that call it."""
    yield path, command
    if hasattr(command, "list_commands"):
        context = command.make_context("x", [], resilient_parsing=True)
        for name in command.list_commands(context):
            yield from walk(command.get_command(context, name), (*path, name))


COMMANDS = dict(walk(typer.main.get_command(commands.app)))
OPTIONS = [
    (path, option)
    for path, command in COMMANDS.items()
    for option in command.params
    if option.param_type_name == "option" and option.name not in ("help", "version")
]
NAMED = [pytest.param(p, o, id=" ".join((*p, o.opts[0]))) for p, o in OPTIONS]


def run(*arguments: str):
    done = CliRunner().invoke(commands.app, list(arguments), env=WIDE)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def shown(*arguments: str) -> str:
    return " ".join(re.sub("[│╭╮╰╯─]", " ", run(*arguments).output).split())


def test_the_walk_finds_the_commands():
    names = {" ".join(path) for path in COMMANDS}
    assert names >= {"list", "show", "doctor", "train", "generate", "presets", "export", "prove numerics", "prove fa4"}
    assert len(OPTIONS) > 25


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_refuses_an_option_that_it_does_not_have(path):
    assert run(*path, "--help").exit_code == 0
    arguments = ["x" for p in COMMANDS[path].params if p.param_type_name != "option"]
    done = run(*path, *arguments, "--no-such-option", "1")
    assert done.exit_code == 2
    assert "--no-such-option" in done.output


@pytest.mark.parametrize(("path", "option"), NAMED)
def test_help_shows_the_default_of_every_option(path, option):
    text = shown(*path, "--help")
    own = text[text.index(option.opts[0] + " ") :]
    following = [o.opts[0] for p, o in OPTIONS if p == path and o is not option]
    ends = [own.index(f" {name} ") for name in (*following, "--help") if f" {name} " in own]
    assert re.search(r"\[default: [^]]|\[required\]", own[: min(ends)] if ends else own), own[:200]


def wrong_value(option) -> str | None:
    """A value that this option cannot have; None where there is none."""
    if option.is_flag or option.opts[0] in FREE:
        return None
    return "/" if option.name in PATHS else "no-such-thing"


@pytest.mark.parametrize(("path", "option"), [p for p in NAMED if wrong_value(p.values[1])])
def test_a_value_of_the_wrong_kind_is_wrong_use(path, option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if has_package("triton"):
        importlib.import_module("triton.experimental.gluon")  # while it is interpreted, as Triton itself was loaded
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    needed = [w for o in COMMANDS[path].params if o.required and o is not option for w in given(o, tmp_path)]
    done = run(*path, *needed, option.opts[0], wrong_value(option))
    assert done.exit_code == 2, done.output
    assert option.opts[0] in done.output
    assert wrong_value(option) in done.output or "Input should be a valid" in done.output  # typer's, for numbers
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def given(parameter, folder: Path) -> list[str]:
    value = str(folder) if parameter.name in PATHS else "fused_relu_squared"
    return [parameter.opts[0], value] if parameter.param_type_name == "option" else [value]


@pytest.mark.parametrize("path", [p for p in COMMANDS if p and p[-1] in ("show", "export", "generate")], ids=" ".join)
def test_a_missing_argument_is_wrong_use(path):
    assert run(*path).exit_code == 2


@pytest.mark.parametrize("arguments", [("list", "atention"), ("show", "atention"), ("show", "atention", "--json")])
def test_an_unknown_name_is_wrong_use(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "did you mean attention" in done.output


# ``train`` takes its options from RunConfig, by tyro.

TRAIN_DEFAULT = re.compile(r"\(default: [^)]+\)|show this help")


def test_train_shows_a_default_for_every_option():
    for preset in PRESETS:
        done = CliRunner().invoke(commands.app, ["train", "--preset", preset, "--help"], env={"COLUMNS": "90"})
        assert done.exit_code == 0
        lines = "\n".join(line for line in done.output.splitlines() if line.startswith("│"))
        options = re.findall(r"│ -.*(?:\n│  .*)*", lines)
        assert len(options) > 50, "the model's too"
        assert [option for option in options if not TRAIN_DEFAULT.search(" ".join(option.split()))] == []
        assert f"(default: {PRESETS[preset].steps})" in done.output, "of this preset"
        assert f"(default: {PRESETS[preset].model.pattern})" in done.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--steps x", ["--steps", "INT", "'x'"]),
        ("--steps 0", ["steps must be at least 1, got 0"]),
        ("--dtype int8", ["'int8'", "--dtype", "float32", "bfloat16"]),
        ("--preset huge", ["preset must be one of tiny, nano, small, base, got 'huge'"]),
        ("--model.pattern AX", ["pattern must be made of the letters", "got 'AX'"]),
        ("--model.dim 0", ["dim must be at least 1, got 0"]),
        ("--data /nowhere", ["--data must be a folder or a file of text, got /nowhere"]),
        ("--set accumulate", ["--set must be NAME=VALUE, as accumulate=2, got 'accumulate'"]),
        ("--set", ["--set must be NAME=VALUE"]),
        ("--set recompute=yes", ["--set recompute must be true or false, got 'yes'"]),
        ("--set model.latent.fused=1", ["--set model.latent.fused must be true or false, got '1'"]),
        ("--set accumulate=true", ["--accumulate", "'true'"]),
        ("--set nothing=3", ["--nothing"]),
        ("--steps 3 --set steps=4", ["--set steps must not repeat --steps, got '4' beside it"]),
        ("--resume", ["--out must be a run folder, got none, and there is no run under runs/"]),
        ("--resume --out /nowhere", ["--out must be a run folder, got /nowhere"]),
    ],
)
def test_wrong_use_of_train(arguments, expected, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    done = run("train", *arguments.split())
    assert done.exit_code == 2
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", done.output + capfd.readouterr().err).split())
    assert [e for e in expected if e not in text] == [], text
    assert not list(tmp_path.iterdir())
