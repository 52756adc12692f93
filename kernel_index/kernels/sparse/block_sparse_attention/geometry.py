"""The geometry of the Triton kernels: rows, queries and heads of a program, keys of a tile, warps, stages."""

from typing import NamedTuple

from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.launch import (
    INTERPRETED_CONFIG,
    SMALLEST_DOT,
    THREE_PROGRAMS,
    AttentionLaunch,
    Config,
    attention_launch,
    dot_block,
    interpreting,
    next_power_of_2,
)


class Cut(NamedTuple):
    """The rows of a program: ``queries`` tokens × ``heads`` of the ``group`` heads that share their selected blocks."""

    queries: int
    heads: int
    group: int

    @property
    def rows(self) -> int:
        return self.queries * self.heads


def cut_of(group: int, element_bytes: int, query_tile_size: int) -> Cut:
    """The same for all kernels of a call, because the union lists are made for it.

    The heads of a group select the same blocks, so a program takes as many of them as it can.  The queries of a program
    share a union of blocks: fewer queries waste fewer products on blocks that only another query selected, more queries
    read a shared block less often.  64 rows are what a warp group multiplies at once.
    """
    rows = 64 if element_bytes < 4 and not interpreting() else 32
    together = min(next_power_of_2(group), rows)
    fewest = max(1, SMALLEST_DOT // together)
    queries = max(fewest, min(rows // together, next_power_of_2(query_tile_size + 1) // 2))
    return Cut(queries, together, group)


def pick_config(kernel: str, rows: int, width: int, element_bytes: int, capped: bool, target: Target) -> Config:
    """The geometry for ``forward``, ``queries`` or ``keys``, from the larger head size and whether there is a softcap.

    The largest that spilled no register on sm_90 and sm_100 before the careful walk stood beside the first one
    (docs/decisions/0015); compiled ahead of time, and those for keys on sm_90 timed (docs/decisions/0027).
    """
    if interpreting():
        return INTERPRETED_CONFIG._replace(tile=rows)
    keys = kernel == "keys"
    if element_bytes == 4:  # no tensor cores in full float32; two stages keep operands out of registers
        narrow = width > 64 and (keys or kernel == "forward" or width > 128)
        return Config(rows, 16 if narrow else 32, 4 if kernel == "forward" and width <= 128 else 8, 2)
    if width > 128:
        return Config(rows, 16 if keys else 32, 8, 2)
    tight = kernel != "forward" and (capped or target.arch not in (90, 100))
    step = 32 if tight else 64
    if target.kind == "hip" and keys:
        return Config(rows, step, 4, 1)
    three = width <= 64 and (target.arch == 100 or (target.arch == 90 and kernel == "queries"))
    registers = THREE_PROGRAMS if three else None
    # Two programs of four warps that spill took 6.5 ms on an H200 where one of eight took 10.2.
    warps = 8 if keys and width > 64 and (capped or target.arch != 90) else 4
    # A third stage fetches the rows' list one tile earlier, and from 64 columns down the rows themselves.
    return Config(rows, step, warps, 3 if keys or width <= 64 else 2, registers)


def launch_of(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, block_size: int, cut: Cut, scale: float | None, softcap: float
) -> AttentionLaunch:
    width, target = max(q.shape[3], v.shape[3]), target_of(q.device)
    config = pick_config(kernel, cut.rows, width, q.element_size(), softcap > 0, target)
    return attention_launch(
        config,
        q,
        v,
        scale,
        softcap,
        BM=config.tile,
        BN=min(config.step, dot_block(block_size)),
        BLOCK=block_size,
        QUERIES=cut.queries,
        HEADS=cut.heads,
        GROUP=cut.group,
        GROUPS=q.shape[2] // cut.group // k.shape[2],
    )
