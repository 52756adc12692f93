"""Argument checks of ``union_selection``, by value where the selection is on the host."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.core.rules import host_readable

UnionMode = Literal["auto", "bitmap", "sort"]
MODES = ("auto", "bitmap", "sort")

SORTED_ABOVE = 16
"""``auto`` sorts where there are more than this many blocks for each selected block of a tile."""


class UnionCall(NamedTuple):
    """One checked call."""

    selected: Tensor  # [B, T, K, n]
    selected_valid: Tensor | None
    query_tile_size: int
    num_blocks: int
    mode: str

    @property
    def is_selected(self) -> Tensor:
        """bool [B, T, K, n]."""
        here = self.selected >= 0
        return here if self.selected_valid is None else here & self.selected_valid

    @property
    def tiles(self) -> int:
        return -(-self.selected.shape[1] // self.query_tile_size)

    @property
    def width(self) -> int:
        """U: the most blocks that a tile can select."""
        return min(self.query_tile_size * self.selected.shape[3], self.num_blocks)


def check(selected: Any, query_tile_size: Any, num_blocks: Any, selected_valid: Any, mode: Any) -> UnionCall:
    checks.is_integer_tensor("selected", selected)
    checks.has_rank("selected", selected, 4, "[B, T, K, n]")
    checks.is_int("query_tile_size", query_tile_size, minimum=1)
    checks.is_int("num_blocks", num_blocks, minimum=0)
    check_valid(selected, selected_valid)
    checks.one_of("mode", mode, MODES)
    check_blocks_exist(selected, selected_valid, num_blocks)
    return UnionCall(selected, selected_valid, query_tile_size, num_blocks, mode)


def check_valid(selected: Tensor, selected_valid: Any) -> None:
    if selected_valid is not None:
        checks.is_tensor("selected_valid", selected_valid)
        checks.has_dtype("selected_valid", selected_valid, torch.bool, "like every mask of selected blocks")
        checks.has_shape("selected_valid", selected_valid, tuple(selected.shape), "of selected's shape")
        checks.on_device("selected_valid", selected_valid, selected, "selected")


def check_blocks_exist(selected: Tensor, selected_valid: Tensor | None, num_blocks: int) -> None:
    """Blocks that do not exist are refused where they can be read without waiting for a device."""
    if not host_readable(selected, selected_valid):
        return
    if num_blocks > torch.iinfo(selected.dtype).max:  # as a number of that dtype it would be another one
        return
    beyond = selected >= num_blocks
    if selected_valid is not None:
        beyond &= selected_valid
    if beyond.any():
        worst = int(selected[beyond].max())
        raise ValueError(f"selected must be of block indices below {num_blocks}, or negative for none, got {worst}")


MOST_SORTED = 4096
"""Entries of a tile that one program sorts."""


def triton_why_not(call: UnionCall) -> str | None:
    if call.mode == "bitmap":
        return "its one form is a sort: mode='bitmap' is another"
    if call.query_tile_size * call.selected.shape[3] > MOST_SORTED:
        return "sorts at most 4,096 entries of a tile"  # MOST_SORTED
    return rules.triton_why_not(call.selected, call.selected_valid)


def triton_not_worth(call: UnionCall) -> str | None:
    return rules.triton_not_worth(call.selected)


def triton_details(call: UnionCall) -> tuple[tuple[str, Any], ...]:
    return details(call._replace(mode="sort"))


def details(call: UnionCall) -> tuple[tuple[str, Any], ...]:
    if torch.compiler.is_compiling():  # sizes are symbols in a trace
        return ()
    entries = call.query_tile_size * call.selected.shape[3]
    return ("mode", resolve_mode(call.mode, entries, call.num_blocks)), ("blocks", call.num_blocks)


def resolve_mode(mode: str, tile_entries: int, num_blocks: int) -> str:
    """The mode that ``auto`` means for tiles of this many selected blocks, duplicates counted."""
    if mode != "auto":
        return mode
    return "sort" if num_blocks > SORTED_ABOVE * tile_entries else "bitmap"
