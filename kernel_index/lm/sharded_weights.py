"""A sharded model on disk: each process writes its shard of every tensor, and any number of processes read them back.

The shards of a process are one safetensors file: reading it executes no code from the file, as unpickling would.
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


def content_of(tensors: Mapping[str, Tensor], group: Group) -> bytes:
    """This process's file: its shards, and from the first process the tensors that every process holds in full."""
    own: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    dims: dict[str, int] = {}  # the sharded dimension, where it is not the first
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            own[name], dim = _shard(name, tensor)
            shapes[name] = list(tensor.shape)
            dims |= {name: dim} if dim else {}
        elif group.rank == 0:
            own[name] = tensor.detach().contiguous()
    return save(own, {"shapes": json.dumps(shapes), "dims": json.dumps(dims)})


def _shard(name: str, tensor: Any) -> tuple[Tensor, int]:
    """What FSDP2 or tensor parallelism keeps here, in the order of the processes, and the sharded dimension."""
    if [p.is_shard() for p in tensor.placements] != [True]:
        raise ValueError(f"{name} must be sharded over one dimension of processes, got {tensor.placements}")
    return tensor.to_local().detach().contiguous(), tensor.placements[0].dim


def file_name(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.safetensors"


def are_in(folder: Path) -> bool:
    return any(folder.glob("part-*.safetensors"))


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor in full.  Raises ``ValueError`` where a file or a shard is missing, or one too many."""
    names = sorted(path.name for path in folder.glob("part-*.safetensors"))
    size = re.search(r"-of-(\d+)", names[0])
    if size is None or names != [file_name(rank, int(size[1])) for rank in range(int(size[1]))]:
        raise ValueError(f"the files must be all of one set, got {', '.join(names)}")
    shards: dict[str, list[Tensor]] = {}
    shapes: dict[str, Any] = {}
    dims: dict[str, Any] = {}
    for name in names:
        content = (folder / name).read_bytes()
        shapes |= _metadata(content, "shapes")
        dims |= _metadata(content, "dims")
        for key, tensor in load(content).items():
            shards.setdefault(key, []).append(tensor)
    # Sorted: in the same order in every process.
    return {k: _joined(k, shards[k], shapes.get(k), dims.get(k, 0)) for k in sorted(shards)}


def _metadata(content: bytes, what: str) -> dict[str, Any]:
    """An entry of a file's header: the full shapes of its tensors, or their sharded dimensions."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found = json.loads(header["__metadata__"].get(what, "{}"))
    if not isinstance(found, dict):
        raise ValueError(f"the {what} of a file must be an object, got {type(found).__name__}")
    return found


def _joined(name: str, shards: list[Tensor], shape: Any, dim: Any) -> Tensor:
    if type(dim) is not int or not 0 <= dim < max(1, shards[0].ndim):
        raise ValueError(f"{name} must be sharded along one of its {shards[0].ndim} dimensions, got {dim!r}")
    others = {(t.dtype, t.shape[:dim], t.shape[dim + 1 :]) for t in shards}
    if len(others) > 1 or (len(shards) > 1 and shards[0].ndim == 0):
        raise ValueError(f"the shards of {name} must be slices of one tensor, got {[tuple(t.shape) for t in shards]}")
    whole = shards[0] if len(shards) == 1 else torch.cat(shards, dim)
    if shape is not None and list(whole.shape) != shape:
        raise ValueError(f"the shards of {name} must make up {shape}, got {list(whole.shape)}")
    if shape is None and len(shards) > 1:
        raise ValueError(f"{name} must be in one file, got it in {len(shards)}")
    return whole
