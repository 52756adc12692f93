"""A selection in the order of the kernels: sorted for each query."""

from typing import NamedTuple

import torch
from torch import Tensor


class SortedTokens(NamedTuple):
    """``indices`` int32 [B, T, P, n], ascending, −1 for a repeated one; kernels read the first ``counts`` [B, T, P].

    Entries that are not valid, out of range or forbidden by the mask come after those and are never read.
    """

    indices: Tensor
    counts: Tensor


def sort_selected(indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor, keys: int) -> SortedTokens:
    """From [B, T, P, n] and the intervals [rows, T]; nothing waits for the device."""
    legal = (indices >= start[..., None, None]) & (indices < end[..., None, None])
    if valid is not None:
        legal = legal & valid
    ordered = torch.where(legal, indices, keys).to(torch.int32).sort(-1).values
    counts = (ordered < keys).sum(-1, dtype=torch.int32)
    again = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    return SortedTokens(torch.where(again | (ordered == keys), -1, ordered).contiguous(), counts.contiguous())
