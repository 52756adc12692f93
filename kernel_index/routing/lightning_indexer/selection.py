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

    def within(self, paths: Tensor) -> "TokenSelection":
        """The same tokens as indices of each row's path, int64 [B, m] ascending; those beside it are not valid."""
        if paths.shape[1] == 0:
            return TokenSelection(torch.full_like(self.indices, -1), torch.zeros_like(self.valid), self.scores)
        flat = self.indices.long().flatten(1).contiguous()
        at = torch.searchsorted(paths.contiguous(), flat).clamp(max=paths.shape[1] - 1)
        valid = self.valid & (paths.gather(1, at) == flat).view_as(self.valid)
        return TokenSelection(torch.where(valid, at.view_as(self.indices), -1), valid, self.scores)

    def of_row(self, paths: Tensor) -> "TokenSelection":
        """The reverse: indices of each row's path as those of the row."""
        if paths.shape[1] == 0:
            return self
        at = paths.gather(1, self.indices.long().clamp(min=0).flatten(1)).view_as(self.indices)
        return TokenSelection(torch.where(self.valid, at, -1), self.valid, self.scores)


def replayed(replay: TokenSelection, start: Tensor, end: Tensor) -> Tensor:
    """The recorded tokens, int64; −1 for those that the intervals [rows, T] of this mask forbid."""
    allowed = (replay.indices >= start[..., None]) & (replay.indices < end[..., None]) & replay.valid
    return torch.where(allowed, replay.indices.long(), -1)
