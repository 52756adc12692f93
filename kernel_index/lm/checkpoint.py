"""Checkpoints: safetensors written beside the old ones and renamed into place, so that a crash loses nothing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

KEEP = 2
"""Checkpoints kept in a run folder: the newest, and the one before it in case the disk holds a surprise."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or does not belong to this model."""


class Checkpoint(NamedTuple):
    """What is needed to go on as if nothing had happened."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def write(run: Path, checkpoint: Checkpoint) -> Path:
    """Write ``run/checkpoint-<step>``: complete under its final name, or not there at all."""
    final = run / f"checkpoint-{checkpoint.step:08d}"
    draft = run / f".{final.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write_file(draft / "model.safetensors", save(_contiguous(checkpoint.model)))
        _write_file(draft / "optimizer.safetensors", save(_contiguous(checkpoint.optimizer)))
        _write_file(draft / "state.json", json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1).encode())
        _sync_folder(draft)
        if final.exists():  # the same step of the same run, written again after a resume
            shutil.rmtree(final)
        os.rename(draft, final)
        _sync_folder(run)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        kept = newest(run)
        rest = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write {final}: {error.strerror or error}; {rest}") from error
    for old in _all(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    found = _all(run)
    return found[-1] if found else None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint folder, or the newest one of a run folder."""
    folder = path if (path / "state.json").is_file() else newest(path)
    if folder is None:
        raise CheckpointError(f"{path} must be a checkpoint or a run folder that holds one")
    try:
        state = json.loads((folder / "state.json").read_text())
        model = load((folder / "model.safetensors").read_bytes())
        optimizer = load((folder / "optimizer.safetensors").read_bytes())
        return Checkpoint(state.pop("step"), model, optimizer, state)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        others = [p.name for p in _all(folder.parent) if p != folder]
        rest = f"; also there: {', '.join(others)}" if others else ""
        raise CheckpointError(f"cannot read {folder}: {error}{rest}") from error


def load_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill a model; a checkpoint of another model is refused before anything is changed."""
    own = model.state_dict()
    problems = [f"{n} is missing" for n in own if n not in checkpoint.model]
    problems += [f"{n} is unknown" for n in checkpoint.model if n not in own]
    problems += [
        f"{n} is {tuple(t.shape)}, not {tuple(own[n].shape)}"
        for n, t in checkpoint.model.items()
        if n in own and t.shape != own[n].shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(f"the checkpoint is of another model: {shown}")
    model.load_state_dict(checkpoint.model)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, with the random generator's state."""
    names = {id(p): n for n, p in model.named_parameters()}
    out = {
        f"{names[id(p)]}:{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    return {**out, ":rng": torch.get_rng_state()}


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``, the random generator included."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, key = name.rsplit(":", 1)
        if parameter:
            optimizer.state[parameters[parameter]][key] = value
    torch.set_rng_state(tensors[":rng"])


def _all(run: Path) -> list[Path]:
    return sorted(p for p in run.glob("checkpoint-*") if (p / "state.json").is_file())


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().contiguous() for n, t in tensors.items()}


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
