"""The order of the rows behind a router, as the functions of this family take it."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, rules

MOST_ROWS = 2**31 - 1
"""Rows in the order of their experts: their numbers are int32."""

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes: PyTorch's grouped kernels read a row of C or F elements in units of this size."""


def check_slots(slots: Any, like: Tensor, name: str) -> None:
    """A permutation of the rows; where the values can be read, another one is an error."""
    checks.is_tensor("slots", slots)
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots must be int32 or int64, got {slots.dtype}")
    checks.has_rank("slots", slots, 2, "[N, k]")
    if slots.shape[1] == 0:
        raise ValueError(f"slots must be [N, k] with k of at least 1, got shape {tuple(slots.shape)}")
    checks.on_device("slots", slots, like, name)
    if rules.host_readable(slots) and slots.numel():
        least, most = slots.aminmax()
        if least < 0 or most >= slots.numel():
            raise ValueError(f"slots must be in [0, {slots.numel()}), got {int(least if least < 0 else most)}")
        counts = torch.bincount(slots.flatten())
        if counts.max() > 1:
            raise ValueError(f"slots must hold each number once, got {int(counts.argmax())} more than once")


def check_offsets(offsets: Any, groups: int, rows: int, like: Tensor) -> None:
    """The end of each group's rows among so many."""
    checks.is_integer_tensor("offsets", offsets)
    checks.has_dtype("offsets", offsets, torch.int32, "as PyTorch's grouped kernels read it")
    checks.has_shape("offsets", offsets, (groups,), "[E]")
    checks.on_device("offsets", offsets, like, "x")
    if rules.host_readable(offsets):
        ends = offsets.tolist()
        if ends[-1] != rows or any(end < start for start, end in zip([0, *ends], ends, strict=False)):
            raise ValueError(f"offsets must not decrease and must end at the {rows} rows of x, got {ends}")


def grouped_mm_why_not(x: Tensor, *weights: Tensor) -> str | None:
    """What PyTorch's grouped product takes: rows x, and matrices of each group."""
    if x.dtype not in SUPPORTED:
        return "computes in float32, bfloat16 or float16"
    if any(size * x.element_size() % ALIGNMENT for weight in weights for size in weight.shape[1:]):
        return "needs rows of C and of F elements that are multiples of 16 bytes"
    return rules.plain_why_not(x, *weights)
