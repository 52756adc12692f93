"""Packs a score and its index into one integer key, so that every top-k is exact and ties have one winner.

``key = rank · 2³¹ + (2³¹ − 1 − index)``, int64, where ``rank`` is the order of the float32 score as a signed integer: a
larger score has a larger key, and among equal scores the smaller index has.  All keys of a row differ, so ``topk`` has
one answer on every device, and score and index are read back from the key without a gather.  −0 and 0 are a tie.  NaN
of either sign ranks above +∞, as in ``torch.topk``.
"""

import torch
from torch import Tensor

from kernel_index.core.rules import host_readable

INDICES = 2**31
"""Indices that fit into a key, and the factor of the rank."""

NOTHING = -(2**63)
"""Below every key: what may not be selected."""

FORCED = 2**31
"""A rank above that of every score."""


def rank_of(scores: Tensor) -> Tensor:
    """int64 of the same order as the scores, which are compared in float32."""
    fp32 = scores.to(torch.float32) + 0.0  # −0 becomes 0
    bits = fp32.view(torch.int32)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers: the larger the magnitude, the smaller
    return torch.where(fp32.isnan(), INDICES - 1, rank.to(torch.int64))


def pack(rank: Tensor, index: Tensor) -> Tensor:
    """The keys of indices in [0, 2³¹)."""
    return rank * INDICES + (INDICES - 1 - index)


def index_of(key: Tensor) -> Tensor:
    """The index of each key, int64; meaningless for ``NOTHING``."""
    return INDICES - 1 - (key & (INDICES - 1))


def score_of(key: Tensor) -> Tensor:
    """The float32 score of each key that was not forced; meaningless for ``NOTHING``."""
    rank = (key >> 31).clamp(-INDICES, INDICES - 1).to(torch.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).view(torch.float32)


def best_keys(scores: Tensor, allowed: Tensor, index: Tensor, count: int) -> Tensor:
    """The keys of the ``count`` best allowed scores along the last dimension, in any order; then ``NOTHING``.

    On a host the scores themselves decide where no tie does, which is several times cheaper; the choice is the same.
    ``allowed`` and ``index`` broadcast with the scores; ``count`` is at most their number.
    """
    found = _by_value(scores, allowed, index, count) if host_readable(scores) else None
    if found is not None:
        return found
    keys = torch.where(allowed, pack(rank_of(scores), index), NOTHING)
    return torch.topk(keys, count, dim=-1, sorted=False).values


def _by_value(scores: Tensor, allowed: Tensor, index: Tensor, count: int) -> Tensor | None:
    """None where the values alone do not decide.

    One more than needed is asked for: a tie between the last one selected and the first one left, a NaN among those
    left, or an allowed score of −∞ leaves the choice to the keys.
    """
    columns = scores.shape[-1]
    values, at = torch.topk(torch.where(allowed, scores.to(torch.float32), -torch.inf), min(count + 1, columns), dim=-1)
    best = values[..., :count]
    selected = best != -torch.inf
    if not bool(selected.all()) and bool((selected.sum(-1) != allowed.sum(-1).clamp(max=count)).any()):
        return None
    if 0 < count < columns:
        left = values[..., count]
        if bool((((best[..., -1] == left) & (left != -torch.inf)) | left.isnan()).any()):
            return None
    found = index.expand_as(scores).gather(-1, at[..., :count])
    return torch.where(selected, pack(rank_of(best), found), NOTHING)
