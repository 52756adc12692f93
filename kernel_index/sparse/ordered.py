"""Scores and places packed into integers of one order, so that every top-k is exact and ties have one winner.

``key = rank · 2³¹ + (2³¹ − 1 − place)``, int64, where ``rank`` is the float32 score's own order as a signed integer: a
larger score has a larger key, among equal scores the smaller place has.  All keys of a row differ, so that ``topk`` has
one answer on every device, and score and place are read back from the key without a gather.  NaN ranks above +∞, as in
``torch.topk``; −0 and 0 are a tie.
"""

import torch
from torch import Tensor

PLACES = 2**31
"""Places that fit into a key, and the factor of the rank."""

NOTHING = -(2**63)
"""Below every key: what may not be taken."""

FORCED = 2**31
"""A rank above every score's."""


def rank_of(scores: Tensor) -> Tensor:
    """int64 of the same order as the scores, which are compared in float32."""
    wide = scores.to(torch.float32) + 0.0  # −0 becomes 0
    bits = wide.view(torch.int32)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers: the more magnitude, the less
    return torch.where(wide.isnan(), PLACES - 1, rank.to(torch.int64))


def pack(rank: Tensor, place: Tensor) -> Tensor:
    """The keys of places in [0, 2³¹)."""
    return rank * PLACES + (PLACES - 1 - place)


def place_of(key: Tensor) -> Tensor:
    """The place of each key, int64; whatever stands for ``NOTHING``."""
    return PLACES - 1 - (key & (PLACES - 1))


def score_of(key: Tensor) -> Tensor:
    """The float32 score of each key that was not forced; whatever stands for ``NOTHING``."""
    rank = (key >> 31).clamp(-PLACES, PLACES - 1).to(torch.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).view(torch.float32)
