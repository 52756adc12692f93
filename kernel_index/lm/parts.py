"""A sharded model on disk: each process writes its slice of every tensor, and any number of processes read them back.

A part is a safetensors file, so reading one runs no code of whoever wrote it, as unpickling would.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from kernel_index.lm.distributed import Group, is_sharded


def content_of(part: Mapping[str, Tensor], group: Group) -> bytes:
    """This process's part: its slice of the sharded tensors; of those that all have alike, the first process's."""
    own: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    dims: dict[str, int] = {}  # along which a tensor was cut, where those are not its rows
    for name, tensor in part.items():
        if is_sharded(tensor):
            own[name], dim = _slice(name, tensor)
            shapes[name] = list(tensor.shape)
            dims |= {name: dim} if dim else {}
        elif group.rank == 0:
            own[name] = tensor.detach().contiguous()
    return save(own, {"shapes": json.dumps(shapes), "dims": json.dumps(dims)})


def _slice(name: str, tensor: Any) -> tuple[Tensor, int]:
    """What FSDP2 or tensor parallelism keeps here, in the order of the processes, and along which dimension."""
    if [p.is_shard() for p in tensor.placements] != [True]:
        raise ValueError(f"{name} must be sharded over one dimension of processes, got {tensor.placements}")
    return tensor.to_local().detach().contiguous(), tensor.placements[0].dim


def file_name(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.safetensors"


def are_in(folder: Path) -> bool:
    return any(folder.glob("part-*.safetensors"))


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor in full.  Raises ``ValueError`` where a part or a slice is missing, or one too many."""
    names = sorted(path.name for path in folder.glob("part-*.safetensors"))
    size = re.search(r"-of-(\d+)", names[0])
    if size is None or names != [file_name(rank, int(size[1])) for rank in range(int(size[1]))]:
        raise ValueError(f"the parts must be all of one set, got {', '.join(names)}")
    pieces: dict[str, list[Tensor]] = {}
    shapes: dict[str, Any] = {}
    dims: dict[str, Any] = {}
    for name in names:
        content = (folder / name).read_bytes()
        shapes |= _told(content, "shapes")
        dims |= _told(content, "dims")
        for key, tensor in load(content).items():
            pieces.setdefault(key, []).append(tensor)
    return {k: _joined(k, pieces[k], shapes.get(k), dims.get(k, 0)) for k in sorted(pieces)}  # alike in every process


def _told(content: bytes, what: str) -> dict[str, Any]:
    """What a part's header tells about its tensors: their shapes in full, and along which dimension they were cut."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    told = json.loads(header["__metadata__"].get(what, "{}"))
    if not isinstance(told, dict):
        raise ValueError(f"the {what} of a part must be an object, got {type(told).__name__}")
    return told


def _joined(name: str, found: list[Tensor], shape: Any, dim: Any) -> Tensor:
    if type(dim) is not int or not 0 <= dim < max(1, found[0].ndim):
        raise ValueError(f"{name} must have been cut along one of its {found[0].ndim} dimensions, got {dim!r}")
    others = {(t.dtype, t.shape[:dim], t.shape[dim + 1 :]) for t in found}
    if len(others) > 1 or (len(found) > 1 and found[0].ndim == 0):
        raise ValueError(f"the parts of {name} must be slices of one tensor, got {[tuple(t.shape) for t in found]}")
    whole = found[0] if len(found) == 1 else torch.cat(found, dim)
    if shape is not None and list(whole.shape) != shape:
        raise ValueError(f"the parts of {name} must make up {shape}, got {list(whole.shape)}")
    if shape is None and len(found) > 1:
        raise ValueError(f"{name} must be in one part, got {len(found)}")
    return whole
