"""The specification: one product for each group."""

import torch
from torch import Tensor

from kernel_index.core import rules


def grouped_product_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _by_slices(x, weight, offsets) if rules.host_readable(offsets) else _by_masks(x, weight, offsets)


def _by_slices(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    rows = zip([0, *ends], ends, weight.unbind(), strict=False)
    return torch.cat([x[start:end] @ w_FC.T for start, end, w_FC in rows])


def _by_masks(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Where offsets cannot be read, as in a trace: every group's product over all rows, of which its own are kept."""
    row_S1 = torch.arange(x.shape[0], device=x.device)[:, None]
    out_SF = x.new_zeros(x.shape[0], weight.shape[1])
    start = torch.zeros((), dtype=offsets.dtype, device=x.device)
    for end, w_FC in zip(offsets.unbind(), weight.unbind(), strict=True):
        out_SF = torch.where((start <= row_S1) & (row_S1 < end), x @ w_FC.T, out_SF)
        start = end
    return out_SF
