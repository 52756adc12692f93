"""How the Triton kernels cut a call: rows of a program, its heads, its queries, keys of a step, warps, stages."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2

SMALLEST = 16
"""Rows and columns that a product on tensor cores has at least."""


class Config(NamedTuple):
    """Keys of a step at most, warps, stages of the software pipeline."""

    step: int
    num_warps: int
    num_stages: int


class Cut(NamedTuple):
    """A program has ``queries`` tokens × ``heads`` of the ``group`` heads that share their picks."""

    queries: int
    heads: int
    group: int

    @property
    def rows(self) -> int:
        return self.queries * self.heads


def cut_of(group: int, element_bytes: int, query_tile_size: int) -> Cut:
    """The same for all kernels of a call, because the union lists are made for it.

    The heads of a group share their picks and so lie in one program, as many as it takes.  The queries beside them
    share a union: fewer of them waste fewer products on blocks that only a neighbour picked, more of them read a shared
    block less often.  64 rows are what a warp group multiplies at once.
    """
    rows = 64 if element_bytes < 4 and not interpreting() else 32
    together = min(next_power_of_2(group), rows)
    fewest = max(1, SMALLEST // together)
    queries = max(fewest, min(rows // together, next_power_of_2(query_tile_size + 1) // 2))
    return Cut(queries, together, group)


def pick_config(kernel: str, width: int, element_bytes: int, capped: bool, target: Target) -> Config:
    """The geometry for ``forward``, ``queries`` or ``keys``, from the larger head size and whether there is a softcap.

    The largest that spill no register on sm_90 and sm_100; compiled ahead of time, not timed.
    """
    if interpreting():
        return Config(SMALLEST, 4, 1)
    keys = kernel == "keys"
    if element_bytes == 4:  # no tensor cores in full float32; two stages keep operands out of registers
        wide = width > 64 and (keys or kernel == "forward" or width > 128)
        return Config(16 if wide else 32, 4 if kernel == "forward" and width <= 128 else 8, 2)
    if width > 128:
        return Config(16 if keys else 32, 8, 2)
    tight = kernel != "forward" and (capped or target.arch not in (90, 100))
    step = 32 if tight else 64
    if target.kind == "hip" and keys:
        return Config(step, 4, 1)
    # A third stage fetches the rows' list one step earlier, and from 64 columns down the rows themselves.
    return Config(step, 8 if keys and width > 64 else 4, 3 if keys or width <= 64 else 2)


class Launch(NamedTuple):
    """What the launches of a call share; the kernels take ``inner`` and ``outer`` for exponentials of base 2."""

    constants: dict[str, Any]
    chunks: int
    scale: float
    inner: float
    outer: float


def launch_of(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, block_size: int, cut: Cut, scale: float | None, softcap: float
) -> Launch:
    width, value_width = q.shape[3], v.shape[3]
    scale = width**-0.5 if scale is None else scale
    config = pick_config(kernel, max(width, value_width), q.element_size(), softcap > 0, target_of(q.device))
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
        "GROUP": cut.group,
        "GROUPS": q.shape[2] // cut.group // k.shape[2],
        "CAPPED": softcap > 0,
        "UPCAST": interpreting(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch(constants, ceil_div(cut.group, cut.heads), scale, inner, outer / math.log(2))


def strides(*tensors: Tensor) -> list[int]:
    """Of batch, token and head."""
    return [s for x in tensors for s in x.stride()[:3]]


def row_stride(bound: Tensor) -> int:
    """From one batch row of an interval's bound to the next: 0 where all rows are alike."""
    return 0 if bound.shape[0] == 1 else bound.shape[1]
