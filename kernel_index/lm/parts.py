"""A sharded model on disk: each process writes its rows of every tensor, and any number of processes read them back.

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
    """This process's part: its rows of the sharded tensors; of those that all have alike, the first process's."""
    own: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in part.items():
        if is_sharded(tensor):
            own[name], shapes[name] = _rows(name, tensor), list(tensor.shape)
        elif group.rank == 0:
            own[name] = tensor.detach().contiguous()
    return save(own, {"shapes": json.dumps(shapes)})


def _rows(name: str, tensor: Any) -> Tensor:
    """What FSDP2 keeps here: consecutive rows, in the order of the processes."""
    if [p.is_shard(0) for p in tensor.placements] != [True]:
        raise ValueError(f"{name} must be sharded by rows over one dimension of processes, got {tensor.placements}")
    return tensor.to_local().detach().contiguous()


def file_name(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.safetensors"


def are_in(folder: Path) -> bool:
    return any(folder.glob("part-*.safetensors"))


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor in full.  Raises ``ValueError`` where a part or a row is missing, or one too many."""
    names = sorted(path.name for path in folder.glob("part-*.safetensors"))
    size = re.search(r"-of-(\d+)", names[0])
    if size is None or names != [file_name(rank, int(size[1])) for rank in range(int(size[1]))]:
        raise ValueError(f"the parts must be all of one set, got {', '.join(names)}")
    pieces: dict[str, list[Tensor]] = {}
    shapes: dict[str, Any] = {}
    for name in names:
        content = (folder / name).read_bytes()
        shapes |= _shapes(content)
        for key, tensor in load(content).items():
            pieces.setdefault(key, []).append(tensor)
    return {key: _joined(key, pieces[key], shapes.get(key)) for key in sorted(pieces)}  # alike in every process


def _shapes(content: bytes) -> dict[str, Any]:
    """The shapes in full that a part's header tells."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    shapes = json.loads(header["__metadata__"]["shapes"])
    if not isinstance(shapes, dict):
        raise ValueError(f"the shapes of a part must be an object, got {type(shapes).__name__}")
    return shapes


def _joined(name: str, found: list[Tensor], shape: Any) -> Tensor:
    if len({(t.dtype, t.shape[1:]) for t in found}) > 1 or (len(found) > 1 and found[0].ndim == 0):
        raise ValueError(f"the parts of {name} must be rows of one tensor, got {[tuple(t.shape) for t in found]}")
    whole = found[0] if len(found) == 1 else torch.cat(found)
    if shape is not None and list(whole.shape) != shape:
        raise ValueError(f"the parts of {name} must make up {shape}, got {list(whole.shape)}")
    if shape is None and len(found) > 1:
        raise ValueError(f"{name} must be in one part, got {len(found)}")
    return whole
