"""The specification: a stable sort by expert, rows taken by index, and a weighted sum over a token's rows."""

import torch
from torch import Tensor

from kernel_index.core import stable
from kernel_index.core.dtypes import compute_dtype
from kernel_index.core.numerics import is_invariant
from kernel_index.core.rows import taken
from kernel_index.kernels.experts.expert_dispatch.contract import Combine


def plan_reference(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    every = torch.arange(count, device=experts.device)
    offsets = (flat[:, None] == every).sum(0).cumsum(0).to(torch.int32)
    return _inverse(order).view(experts.shape).to(torch.int32), offsets


def dispatch_reference(x: Tensor, slots: Tensor) -> Tensor:
    return taken(x, _inverse(slots.flatten().long()) // slots.shape[1])


def combine_reference(call: Combine) -> Tensor:
    rows, weights, slots, base = call
    dtype = compute_dtype(rows, weights)
    found = taken(rows, slots.flatten().long()).view(*slots.shape, rows.shape[1])
    weighted = found.to(dtype) * weights.to(dtype)[..., None]
    total = stable.sum_of(weighted, 1) if is_invariant() else weighted.sum(1)
    return (total if base is None else total + base.to(dtype)).to(rows.dtype)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
