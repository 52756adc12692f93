"""Picks in the order in which kernels want them: sorted for each query, and turned round for each key."""

from typing import NamedTuple

import torch
from torch import Tensor


class Picks(NamedTuple):
    """``places`` int32 [B, T, P, n], ascending, −1 where a pick is repeated; the first ``counts`` [B, T, P] of them.

    What is not valid, out of range or forbidden by the mask stands behind those and is never looked at.
    """

    places: Tensor
    counts: Tensor


class Pickers(NamedTuple):
    """The queries of each key: ``queries[b, p, first[b, p, s] … first[b, p, s + 1] − 1]``, ascending.

    int32 [B, P, T·n] and int64 [B, P, S + 1].
    """

    queries: Tensor
    first: Tensor


def sorted_picks(indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor, keys: int) -> Picks:
    """From [B, T, P, n] and the intervals [rows, T]; nothing waits for the device."""
    legal = (indices >= start[..., None, None]) & (indices < end[..., None, None])
    if valid is not None:
        legal = legal & valid
    places = torch.where(legal, indices, keys).to(torch.int32).sort(-1).values
    counts = (places < keys).sum(-1, dtype=torch.int32)
    again = torch.nn.functional.pad(places[..., 1:] == places[..., :-1], (1, 0))
    return Picks(torch.where(again | (places == keys), -1, places).contiguous(), counts.contiguous())


def pickers_of(places: Tensor, keys: int) -> Pickers:
    """A stable sort by key: the queries of a key keep their order, so its sums are the same bits every time."""
    batch, queries, shared, count = places.shape
    by_selection = places.transpose(1, 2).reshape(batch, shared, queries * count)
    by_selection = torch.where(by_selection >= 0, by_selection, keys)
    ordered, order = by_selection.sort(dim=-1, stable=True)
    key = torch.arange(keys + 1, device=places.device, dtype=torch.int32).expand(batch, shared, -1).contiguous()
    return Pickers((order // max(1, count)).to(torch.int32), torch.searchsorted(ordered, key))
