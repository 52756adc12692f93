"""The tokens that an indexer picked for every query."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSelection(NamedTuple):
    """What ``lightning_indexer`` returns, and what records it: pass it back as ``replay`` and the picks are the same.

    ``indices`` int64 [B, T, topk] by descending score, among equal ones by ascending index, −1 behind the last pick;
    ``valid`` bool, False at those; ``scores`` [B, T, topk] in float32 (float64 for float64), −∞ at those.  Only the
    scores have a gradient.

    >>> import torch, kernel_index as ki
    >>> q, k, w = torch.ones(1, 2, 1, 1), torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2, 1)
    >>> picked = ki.lightning_indexer(q, k, w, topk=2)
    >>> picked.indices.tolist(), picked.scores.tolist()
    ([[[0, -1], [1, 0]]], [[[1.0, -inf], [3.0, 1.0]]])
    """

    indices: Tensor
    valid: Tensor
    scores: Tensor


def replayed(replay: TokenSelection, start: Tensor, end: Tensor) -> Tensor:
    """The recorded picks, int64; what the intervals [rows, T] of this mask forbid is no pick."""
    allowed = (replay.indices >= start[..., None]) & (replay.indices < end[..., None]) & replay.valid
    return torch.where(allowed, replay.indices.long(), -1)
