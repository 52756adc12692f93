"""The checks on a selection, on the host by value."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks

MODES = ("auto", "bitmap", "sort")


def check(selected: Any, query_tile_size: Any, num_blocks: Any, selected_valid: Any, mode: Any) -> None:
    checks.is_integer_tensor("selected", selected)
    checks.has_rank("selected", selected, 4, "[B, T, K, n]")
    checks.is_int("query_tile_size", query_tile_size, minimum=1)
    checks.is_int("num_blocks", num_blocks, minimum=0)
    check_valid(selected, selected_valid)
    checks.one_of("mode", mode, MODES)
    check_picks(selected, selected_valid, num_blocks)


def check_valid(selected: Tensor, selected_valid: Any) -> None:
    if selected_valid is not None:
        checks.is_tensor("selected_valid", selected_valid)
        checks.has_dtype("selected_valid", selected_valid, torch.bool, "like every mask of picks")
        checks.has_shape("selected_valid", selected_valid, tuple(selected.shape), "of selected's shape")
        checks.on_device("selected_valid", selected_valid, selected, "selected")


def check_picks(selected: Tensor, selected_valid: Tensor | None, num_blocks: int) -> None:
    """Picks of blocks that do not exist are refused where that can be seen without waiting for a device."""
    if torch.compiler.is_compiling() or selected.device.type != "cpu" or type(selected) is not Tensor:
        return
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    beyond = selected >= num_blocks
    if selected_valid is not None:
        beyond &= selected_valid
    if beyond.any():
        worst = int(selected[beyond].max())
        raise ValueError(f"selected must be of block indices below {num_blocks}, or negative for none, got {worst}")
