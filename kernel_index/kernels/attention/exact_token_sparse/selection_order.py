"""A selection in the orders of the kernels: sorted for each query, and inverted (the queries of each key)."""

from typing import NamedTuple

import torch
from torch import Tensor


class SortedTokens(NamedTuple):
    """``indices`` int32 [B, T, P, n], ascending, −1 for a repeated one; kernels read the first ``counts`` [B, T, P].

    Entries that are not valid, out of range or forbidden by the mask come after those and are never read.
    """

    indices: Tensor
    counts: Tensor


class InverseSelection(NamedTuple):
    """The queries that selected each key: ``queries[b, p, first[b, p, s] … first[b, p, s + 1] − 1]``, ascending.

    int32 [B, P, T·n] and int64 [B, P, S + 1].
    """

    queries: Tensor
    first: Tensor


def sort_selected(indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor, keys: int) -> SortedTokens:
    """From [B, T, P, n] and the intervals [rows, T]; nothing waits for the device."""
    legal = (indices >= start[..., None, None]) & (indices < end[..., None, None])
    if valid is not None:
        legal = legal & valid
    ordered = torch.where(legal, indices, keys).to(torch.int32).sort(-1).values
    counts = (ordered < keys).sum(-1, dtype=torch.int32)
    again = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    return SortedTokens(torch.where(again | (ordered == keys), -1, ordered).contiguous(), counts.contiguous())


def inverse_selection(indices: Tensor, keys: int) -> InverseSelection:
    """A stable sort by key: the queries of a key keep their order, so its sums are the same bits every time."""
    batch, queries, shared, count = indices.shape
    by_selection = indices.transpose(1, 2).reshape(batch, shared, queries * count)
    by_selection = torch.where(by_selection >= 0, by_selection, keys)
    ordered, order = by_selection.sort(dim=-1, stable=True)
    key = torch.arange(keys + 1, device=indices.device, dtype=torch.int32).expand(batch, shared, -1).contiguous()
    return InverseSelection((order // max(1, count)).to(torch.int32), torch.searchsorted(ordered, key))
