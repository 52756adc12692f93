"""How the Triton kernels cut a call: rows of a program, its heads, its queries, keys of a step, warps, stages."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from kernel_index.gpu import ceil_div, interpreting, next_power_of_2
from kernel_index.target import Target, target_of

SMALLEST = 16
"""Rows and columns that a product on tensor cores has at least."""


class Config(NamedTuple):
    """Rows of a program at most, keys of a step at most, warps, stages of the software pipeline."""

    rows: int
    step: int
    num_warps: int
    num_stages: int


class Cut(NamedTuple):
    """A program has ``queries`` tokens × ``heads`` heads of a group; a group is ``chunks`` such programs wide."""

    queries: int
    heads: int
    chunks: int

    @property
    def rows(self) -> int:
        return self.queries * self.heads


def cut_of(heads: int, element_bytes: int, query_tile_size: int) -> Cut:
    """The same for all kernels of a call, because the union lists are made for it.

    The heads of a group share their picks and so lie in one program, as many as it takes.  The queries beside them
    share a union: fewer of them waste fewer products on blocks that only a neighbour picked, more of them read a shared
    block less often.  64 rows are what a warp group multiplies at once.
    """
    rows = SMALLEST if interpreting() else 64 if element_bytes < 4 else 32
    together = min(next_power_of_2(heads), rows)
    fewest = max(1, SMALLEST // together)
    queries = max(fewest, min(rows // together, next_power_of_2(query_tile_size + 1) // 2))
    return Cut(queries, together, ceil_div(heads, together))


def pick_config(kernel: str, width: int, element_bytes: int, target: Target) -> Config:
    """The geometry for ``forward``, ``queries`` or ``keys``, from the larger head size alone."""
    if interpreting():
        return Config(SMALLEST, 16, 4, 1)
    if element_bytes == 4:
        return Config(32, 32 if width <= 64 else 16, 4, 1)
    roomy = target.arch in (90, 100)  # 227 KiB of shared memory
    if width > 128:
        return Config(64, 32, 4, 2 if kernel == "forward" else 1)
    if kernel == "keys":
        return Config(64, 64, 8 if width > 64 else 4, 2)
    return Config(64, 64, 4, 3 if roomy and width <= 64 else 2)


class Launch(NamedTuple):
    """What the launches of a call share; the kernels take ``inner`` and ``outer`` for exponentials of base 2."""

    constants: dict[str, Any]
    scale: float
    inner: float
    outer: float


def launch_of(
    kernel: str, q: Tensor, v: Tensor, block_size: int, cut: Cut, scale: float | None, softcap: float
) -> Launch:
    width, value_width = q.shape[3], v.shape[3]
    scale = width**-0.5 if scale is None else scale
    config = pick_config(kernel, max(width, value_width), q.element_size(), target_of(q.device))
    inner, outer = (scale / softcap, softcap) if softcap > 0 else (0.0, scale)
    constants = {
        "D": width,
        "DV": value_width,
        "BLOCK_D": max(SMALLEST, next_power_of_2(width)),
        "BLOCK_DV": max(SMALLEST, next_power_of_2(value_width)),
        "BM": cut.rows,
        "BN": min(config.step, max(SMALLEST, next_power_of_2(block_size))),
        "BLOCK": block_size,
        "QUERIES": cut.queries,
        "HEADS": cut.heads,
        "CHUNKS": cut.chunks,
        "CAPPED": softcap > 0,
        "UPCAST": interpreting(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch(constants, scale, inner, outer / math.log(2))


def strides(*tensors: Tensor) -> list[int]:
    """Of batch, token and head."""
    return [s for x in tensors for s in x.stride()[:3]]


def row_stride(bound: Tensor) -> int:
    """From one batch row of an interval's bound to the next: 0 where all rows are alike."""
    return 0 if bound.shape[0] == 1 else bound.shape[1]
