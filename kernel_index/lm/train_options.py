"""The options of ``kernel-index train``: the fields of ``RunConfig``, read and checked by tyro."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from kernel_index.lm.checkpoint import NoCheckpoint
from kernel_index.lm.run_config import RunConfig, read_config

ABOUT = """Train a small language model on real text with the kernels of the index.

--set NAME=VALUE is another way to write --name VALUE. Ctrl-C saves; --resume continues."""

CHANGE_ON_RESUME = ("steps", "checkpoint_every")


@dataclass(frozen=True)
class _Start:
    """What decides the other defaults."""

    preset: str = "tiny"
    out: Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """A run, and what a command does with it."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Run folder. None: a new folder under runs/, or with --resume the newest one there."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --out, or the newest one, with its configuration."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON and nothing else; progress goes to the standard error."""


def read(arguments: Sequence[str]) -> TrainOptions:
    """The options of a command line.  Prints help or what is wrong, and exits, as tyro does.

    A resumed run has the configuration of its folder; only its steps and how often it is saved may change.

    Raises:
        ValueError: an option of a new run has no such value, or one of a resumed run must stay.
        CheckpointError: there is no run to resume.
    """
    given = list(_without_set(arguments))
    known = [a for a in given if a not in ("-h", "--help")]
    start, _ = tyro.cli(_Start, args=known, return_unknown_args=True, add_help=False, prog="kernel-index train")
    if not start.resume:
        options = _parse(given, TrainOptions(RunConfig.from_preset(start.preset)))
        return replace(options, run=_with_whole_path(options.run))
    folder = start.out or newest_run()
    before = read_config(folder)
    options = _parse(given, TrainOptions(before, out=folder))
    options = replace(options, run=_with_whole_path(options.run))
    _refuse_changes(before, options.run)
    return options


def _parse(arguments: list[str], default: TrainOptions) -> TrainOptions:
    return tyro.cli(TrainOptions, args=arguments, default=default, prog="kernel-index train", description=ABOUT)


def _without_set(arguments: Sequence[str]) -> Iterator[str]:
    """``--set accumulate=2`` as ``--accumulate=2``, and ``--set recompute=true`` as ``--recompute``."""
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    waiting = iter(arguments)
    for argument in waiting:
        option, _, setting = argument.partition("=")
        if option != "--set":
            yield argument
            continue
        setting = setting or next(waiting, "")
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise ValueError(f"--set must be NAME=VALUE, as accumulate=2, got {setting!r}")
        if _option(name) in given:
            raise ValueError(f"--set {name} must not repeat {_option(name)}, got {value!r} beside it")
        yield _as_flag(name, value) if _is_flag(name) else f"{_option(name)}={value}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_flag(name: str) -> bool:
    found: Any = RunConfig.from_preset("tiny")  # the types are those of every preset
    for part in name.replace("-", "_").split("."):
        found = getattr(found, part, None)
    return isinstance(found, bool)


def _as_flag(name: str, value: str) -> str:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"--set {name} must be true or false, got {value!r}")
    group, dot, last = name.rpartition(".")
    return _option(name if value.lower() == "true" else f"{group}{dot}no-{last}")


def _with_whole_path(run: RunConfig) -> RunConfig:
    """A resumed run may be started from another folder."""
    return run if run.data is None else replace(run, data=str(Path(run.data).resolve()))


def newest_run() -> Path:
    """The folder below ``runs`` whose configuration was written last."""
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise NoCheckpoint("--out must be a run folder, got none, and there is no run under runs/")
    return runs[-1].parent


def _refuse_changes(before: RunConfig, now: RunConfig) -> None:
    """What a resumed run must keep: all but ``CHANGE_ON_RESUME``."""
    then, asked = (_flat(config.to_json()) for config in (before, now))
    for name, value in asked.items():
        if value != then[name] and name not in CHANGE_ON_RESUME:
            raise ValueError(f"{_option(name)} must stay {then[name]!r} when the run is resumed, got {value!r}")


def _flat(values: dict[str, Any], group: str = "") -> dict[str, Any]:
    """Nested values by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{group}{name}.") if isinstance(value, dict) else {f"{group}{name}": value}
    return found
