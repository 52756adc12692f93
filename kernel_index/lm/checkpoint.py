"""Checkpoints: safetensors written beside the old ones and renamed into place, so that a crash loses nothing."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kernel_index.lm.distributed import Group, is_sharded

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


def write(run: Path, checkpoint: Checkpoint, group: Group | None = None) -> Path:
    """Write ``run/checkpoint-<step>``: complete under its final name, or not there at all.

    Of a sharded model every process of the group writes its own part; such a checkpoint, too, can be read by any
    number of processes.
    """
    final = run / f"checkpoint-{checkpoint.step:08d}"
    draft = run / f".{final.name}.draft"
    if group is not None and group.size > 1:
        return _write_parts(draft, final, checkpoint, group)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write_file(draft / "model.safetensors", save(_contiguous(checkpoint.model)))
        _write_file(draft / "optimizer.safetensors", save(_contiguous(checkpoint.optimizer)))
        _finish(draft, final, checkpoint)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        kept = newest(run)
        rest = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write {final}: {error.strerror or error}; {rest}") from error
    return final


def _finish(draft: Path, final: Path, checkpoint: Checkpoint) -> None:
    """Give a complete draft its name, and drop the oldest checkpoints."""
    _write_file(draft / "state.json", json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1).encode())
    _sync_folder(draft)
    if final.exists():  # the same step of the same run, written again after a resume
        shutil.rmtree(final)
    os.rename(draft, final)
    _sync_folder(final.parent)
    for old in _all(final.parent)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _write_parts(draft: Path, final: Path, checkpoint: Checkpoint, group: Group) -> Path:
    import torch.distributed.checkpoint as dcp

    if group.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    group.wait()
    dcp.save(_named_parts(checkpoint), checkpoint_id=draft)
    if group.rank == 0:
        _finish(draft, final, checkpoint)
    group.wait()
    return final


def _named_parts(checkpoint: Checkpoint) -> dict[str, Tensor]:
    model = {f"model/{n}": t.detach() for n, t in checkpoint.model.items()}
    return model | {f"optimizer/{n}": t for n, t in checkpoint.optimizer.items()}


def _read_parts(folder: Path, step: int, state: dict[str, Any]) -> Checkpoint:
    """All tensors in full, whatever the number of processes that wrote them."""
    import torch.distributed.checkpoint as dcp

    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in found.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, rest = name.split("/", 1)
        parts[part][rest] = tensor
    return Checkpoint(step, parts["model"], parts["optimizer"], state)


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
        if (folder / ".metadata").is_file():
            return _read_parts(folder, state.pop("step"), state)
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
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_like(checkpoint.model[name], tensor))


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
            like = parameters[parameter]
            optimizer.state[like][key] = _like(value, like) if value.ndim else value
    torch.set_rng_state(tensors[":rng"])


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor on the device of another, and sharded as that is."""
    if not is_sharded(tensor):
        return value.to(tensor.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


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
