"""Argument checks and backend eligibility of ``grouped_product``."""

import torch
from torch import Tensor

from kernel_index.core import checks, device_products, native, rules

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes: PyTorch's grouped kernels read a row of C or F elements in units of this size."""


def check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    checks.is_floating("x", x)
    checks.has_rank("x", x, 2, "[S, C]")
    checks.is_floating("weight", weight)
    checks.has_rank("weight", weight, 3, "[E, F, C]")
    if weight.shape[0] == 0:
        raise ValueError("weight must hold at least one group, got none")
    checks.has_shape("weight", weight, (*weight.shape[:2], x.shape[1]), "[E, F, C]")
    checks.has_dtype("weight", weight, x.dtype, "like x")
    checks.on_device("weight", weight, x, "x")
    checks.is_integer_tensor("offsets", offsets)
    checks.has_dtype("offsets", offsets, torch.int32, "as PyTorch's grouped kernels read it")
    checks.has_shape("offsets", offsets, weight.shape[:1], "[E]")
    checks.on_device("offsets", offsets, x, "x")
    if rules.host_readable(offsets):
        _check_values(offsets.tolist(), x.shape[0])


def _check_values(ends: list[int], rows: int) -> None:
    if ends[-1] != rows or any(end < start for start, end in zip([0, *ends], ends, strict=False)):
        raise ValueError(f"offsets must not decrease and must end at the {rows} rows of x, got {ends}")


def triton_why_not(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return device_products.why_not(x, weight) or rules.triton_why_not(offsets)


def native_why_not(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return native.op_why_not(x, weight)


def grouped_mm_why_not(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    if x.dtype not in SUPPORTED:
        return "computes in float32, bfloat16 or float16"
    if any(size * x.element_size() % ALIGNMENT for size in weight.shape[1:]):
        return "needs rows of C and of F elements that are multiples of 16 bytes"
    return rules.plain_why_not(x, weight, offsets)
