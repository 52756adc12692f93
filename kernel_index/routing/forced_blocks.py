"""Blocks that are selected whatever their score."""

from typing import Any, Literal

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.routing.legal_blocks import LegalBlocks

ForcedBlock = Literal["current", "sink", "local"]
FORCED: tuple[ForcedBlock, ...] = ("current", "sink", "local")


def check_forced(forced: Any) -> tuple[str, ...]:
    """The names of forced blocks in the order of ``FORCED``."""
    if isinstance(forced, str) or not isinstance(forced, tuple | list | set | frozenset):
        raise TypeError(f"forced must be a tuple of {', '.join(FORCED)}, got {forced!r}")
    for name in forced:
        checks.one_of("forced", name, FORCED)
    return tuple(name for name in FORCED if name in forced)


def forced_blocks(legal: LegalBlocks, blocks: int, names: tuple[str, ...]) -> Tensor:
    """int64 [rows, T, 1, F]; −1 where the block does not exist, is not legal, or is forced already."""
    first, current = (x.to(torch.int64) for x in legal)
    here = torch.where(current < blocks, current, -1)
    found = {
        "current": here,
        "sink": torch.where(first < current, first, -1),
        "local": torch.where((current - 1 >= first) & (current > 0), current - 1, -1),
    }
    columns: list[Tensor] = []
    for name in names:
        column = found[name]
        for earlier in columns:
            column = torch.where(column == earlier, -1, column)
        columns.append(column)
    if not columns:
        return first.new_empty((*first.shape, 1, 0))
    return torch.stack(columns, -1)[:, :, None]
