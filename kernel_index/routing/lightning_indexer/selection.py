"""The tokens that an indexer selected for every query."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSelection(NamedTuple):
    """What ``lightning_indexer`` returns, and a record of it: passed back as ``replay`` it gives the same tokens.

    ``indices`` int64 [B, T, topk] by descending score, among equal ones by ascending index, −1 after the last token;
    ``valid`` bool, False where the index is −1; ``scores`` [B, T, topk] in float32 (float64 for float64), −∞ there.
    Only the scores have a gradient.

    >>> import torch, kernel_index as ki
    >>> q, k, w = torch.ones(1, 2, 1, 1), torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2, 1)
    >>> selected = ki.lightning_indexer(q, k, w, topk=2)
    >>> selected.indices.tolist(), selected.scores.tolist()
    ([[[0, -1], [1, 0]]], [[[1.0, -inf], [3.0, 1.0]]])
    """

    indices: Tensor
    valid: Tensor
    scores: Tensor

    def within(self, path: Tensor) -> "TokenSelection":
        """The same tokens as indices of a path, int64 [m] ascending; those beside it are not valid."""
        if path.shape[0] == 0:
            return TokenSelection(torch.full_like(self.indices, -1), torch.zeros_like(self.valid), self.scores)
        at = torch.searchsorted(path, self.indices.long()).clamp(max=path.shape[0] - 1)
        valid = self.valid & (path[at] == self.indices)
        return TokenSelection(torch.where(valid, at, -1), valid, self.scores)


def replayed(replay: TokenSelection, start: Tensor, end: Tensor) -> Tensor:
    """The recorded tokens, int64; −1 for those that the intervals [rows, T] of this mask forbid."""
    allowed = (replay.indices >= start[..., None]) & (replay.indices < end[..., None]) & replay.valid
    return torch.where(allowed, replay.indices.long(), -1)
