"""Argument checks and backend eligibility of ``grouped_product``."""

from torch import Tensor

from kernel_index.core import checks, device_products, native, rules
from kernel_index.kernels.experts import order


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
    order.check_offsets(offsets, weight.shape[0], x.shape[0], x)


def triton_why_not(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return device_products.why_not(x, weight) or rules.triton_why_not(offsets)


def native_why_not(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return native.op_why_not(x, weight)


def grouped_mm_why_not(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return order.grouped_mm_why_not(x, weight) or rules.plain_why_not(offsets)
