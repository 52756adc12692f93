"""The specification of every top-k of the family: sort all scores stably and take the first ones."""

import torch
from torch import Tensor


def best_by_sorting(scores: Tensor, priority: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` best scores along the last dimension, best first; then −1.  int64 [..., count].

    ``priority`` (integers that broadcast with the scores) goes before the score; 0 may not be selected.  Among equal
    ones the smallest index wins.  NaN is above +∞.
    """
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    ranked = priority.to(torch.int8).expand_as(scores).gather(-1, by_score)
    ranked = ranked.sort(dim=-1, descending=True, stable=True)
    indices = torch.where(ranked.values > 0, by_score.gather(-1, ranked.indices), -1)
    return torch.nn.functional.pad(indices[..., :count], (0, max(0, count - indices.shape[-1])), value=-1)
