"""Checkpoints: safetensors written beside the old ones and renamed into place, so that a crash loses nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kernel_index.lm import sharded_weights
from kernel_index.lm.distributed import Group, is_sharded

KEEP = 2
"""Checkpoints kept in a run folder: the newest, and the one before it in case the newest cannot be read."""

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""The names of AdamW's state of a parameter."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or does not belong to this model."""

    wrong_use = False


class NoCheckpoint(CheckpointError):
    """What was named is no checkpoint and no run."""

    wrong_use = True


class Checkpoint(NamedTuple):
    """All that a resumed run needs to continue with the same numbers."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def write(run: Path, checkpoint: Checkpoint, group: Group | None = None) -> Path:
    """Write ``run/checkpoint-<step>``: complete under its final name, or not there at all.

    Of a sharded model every process of the group writes its own shards; any number of processes can read them back.
    Raises ``CheckpointError`` in every process when one of them cannot write.
    """
    group = group or Group()
    final = run / f"checkpoint-{checkpoint.step:08d}"
    draft = run / f".{final.name}.draft"
    _together(group, run, final, lambda: _empty_draft(draft) if group.rank == 0 else None)
    _together(group, run, final, lambda: _write_tensors(draft, checkpoint, group))
    _together(group, run, final, lambda: _finish(draft, final, checkpoint) if group.rank == 0 else None)
    return final


def _together(group: Group, run: Path, final: Path, step: Callable[[], None]) -> None:
    """One step of writing, in all processes.  A full disk of one process stops them all, and the draft is removed."""
    failed: OSError | None = None
    try:
        step()
    except OSError as error:
        failed = error
    if not group.sum(float(failed is not None)):
        return
    shutil.rmtree(run / f".{final.name}.draft", ignore_errors=True)
    kept = newest(run)
    rest = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
    why = "another process failed" if failed is None else failed.strerror or failed
    raise CheckpointError(f"cannot write {final}: {why}; {rest}") from failed


def _empty_draft(draft: Path) -> None:
    for folder in (*draft.parent.glob(".checkpoint-*.draft"), *draft.parent.glob("checkpoint-*")):
        if folder.suffix == ".draft" or not (folder / "state.json").is_file():  # a process was killed in the middle
            shutil.rmtree(folder, ignore_errors=True)
    draft.mkdir(parents=True)


def _write_tensors(draft: Path, checkpoint: Checkpoint, group: Group) -> None:
    if group.size > 1:
        tensors = {f"model/{n}": t for n, t in checkpoint.model.items()}
        tensors |= {f"optimizer/{n}": t for n, t in checkpoint.optimizer.items()}
        path = draft / sharded_weights.file_name(group.rank, group.size)
        _write_file(path, sharded_weights.content_of(tensors, group))
        return
    _write_file(draft / "model.safetensors", save(_contiguous(checkpoint.model)))
    _write_file(draft / "optimizer.safetensors", save(_contiguous(checkpoint.optimizer)))


def _finish(draft: Path, final: Path, checkpoint: Checkpoint) -> None:
    """Give a complete draft its name, and drop the oldest checkpoints."""
    _write_file(draft / "state.json", json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1).encode())
    _sync_folder(draft)
    before = final.with_name(final.name + ".before")
    if final.exists():  # written again after a resume: kept until the new one is in place
        _drop(before)
        os.rename(final, before)
    os.rename(draft, final)
    _sync_folder(final.parent)
    _drop(before)
    for old in _all(final.parent)[:-KEEP]:
        _drop(old)


def _drop(folder: Path) -> None:
    """Remove a checkpoint, its ``state.json`` first: without it a folder is no checkpoint."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    found = _all(run)
    return found[-1] if found else None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint folder, or the newest one of a run folder."""
    folder = path if (path / "state.json").is_file() else newest(path)
    if folder is None:
        raise NoCheckpoint(f"--checkpoint must be a checkpoint or a run folder that holds one, got {path}")
    try:
        state = json.loads((folder / "state.json").read_text())
        step = state.pop("step")
        if type(step) is not int or step < 0:
            raise ValueError(f"step must be a count, got {step!r}")
        return Checkpoint(step, *_read_tensors(folder), state)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        others = [p.name for p in _all(folder.parent) if p != folder]
        rest = f"; also there: {', '.join(others)}" if others else ""
        raise CheckpointError(f"cannot read {folder}: {error}{rest}") from error


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors in full, whatever the number of processes that wrote them."""
    if not sharded_weights.are_in(folder):
        return load((folder / "model.safetensors").read_bytes()), load((folder / "optimizer.safetensors").read_bytes())
    found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in sharded_weights.read(folder).items():
        kind, rest = name.split("/", 1)
        found[kind][rest] = tensor
    return found["model"], found["optimizer"]


def check_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Raise ``CheckpointError`` unless the checkpoint's tensors fit this model, which may be on the meta device."""
    own = model.state_dict()
    problems = [f"{n} is missing" for n in own if n not in checkpoint.model]
    problems += [f"{n} is unknown" for n in checkpoint.model if n not in own]
    problems += [
        f"{n} is {t.dtype} {tuple(t.shape)}, not {own[n].dtype} {tuple(own[n].shape)}"
        for n, t in checkpoint.model.items()
        if n in own and (t.shape, t.dtype.is_floating_point) != (own[n].shape, own[n].dtype.is_floating_point)
    ]
    if problems:
        raise CheckpointError(f"the checkpoint is of another model: {_first(problems)}")


def load_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill a model; a checkpoint of another model is refused before anything is changed."""
    check_model(model, checkpoint)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_like(checkpoint.model[name], tensor))


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        f"{names[id(p)]}:{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``; refused before anything is changed."""
    parameters = dict(model.named_parameters())
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(":")
        if parameter:  # older checkpoints hold a random generator's state beside them
            found.setdefault(parameter, {})[key] = value
    problems = [f"{n} is unknown" for n in found if n not in parameters]
    problems += [
        f"{n} has {', '.join(sorted(state))}, not {', '.join(sorted(MOMENTS))}"
        for n, state in found.items()
        if set(state) != MOMENTS
    ]
    problems += [
        f"{key} of {n} is {value.dtype} {tuple(value.shape)}"
        for n, state in found.items()
        for key, value in state.items()
        if n in parameters and not (value.is_floating_point() and value.shape in ((), parameters[n].shape))
    ]
    if problems:
        raise CheckpointError(f"the optimizer's state is of another model: {_first(problems)}")
    for name, like in parameters.items():  # in the same order in every process: each sharded tensor is distributed
        for key in sorted(found.get(name, ())):
            value = found[name][key]
            on_host = value.ndim == 0 and not optimizer.defaults.get("fused")  # a fused one counts on the device
            optimizer.state[like][key] = value if on_host else _like(value, like)


def _first(problems: list[str]) -> str:
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor moved to the device of another tensor, and sharded like it.

    Every process has read the full tensor and keeps its own shard.  Nothing is sent between processes, so the order
    of a file's tensors, which differs from process to process, does not matter.
    """
    if not is_sharded(tensor):
        return value.to(tensor.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def _all(run: Path) -> list[Path]:
    """Oldest first; where a checkpoint has just been replaced by one of the same step, the replaced one comes first."""
    return sorted(
        (p for p in run.glob("checkpoint-*") if (p / "state.json").is_file()), key=lambda p: (p.stem, -len(p.name))
    )


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
