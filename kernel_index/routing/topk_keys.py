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


def best_keys(scores: Tensor, allowed: Tensor, place: Tensor, kept: int) -> Tensor:
    """The keys of the ``kept`` best allowed places along the last dimension, in any order; ``NOTHING`` behind them.

    On a host the scores themselves decide where no tie does, which is several times cheaper; the choice is the same.
    ``place`` broadcasts with the scores; ``kept`` is at most their number.
    """
    found = _by_value(scores, allowed, place, kept) if _may_look(scores) else None
    if found is not None:
        return found
    return torch.topk(torch.where(allowed, pack(rank_of(scores), place), NOTHING), kept, dim=-1, sorted=False).values


def _may_look(scores: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a trace."""
    if torch.compiler.is_compiling() or scores.device.type != "cpu" or type(scores) is not Tensor:
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


def _by_value(scores: Tensor, allowed: Tensor, place: Tensor, kept: int) -> Tensor | None:
    """None where the values alone do not decide.

    One more than needed is asked for: a tie between the last one taken and the first one left, a NaN among those left,
    or an allowed score of −∞ leaves the choice to the keys.
    """
    columns = scores.shape[-1]
    values, at = torch.topk(torch.where(allowed, scores.to(torch.float32), -torch.inf), min(kept + 1, columns), dim=-1)
    best = values[..., :kept]
    taken = best != -torch.inf
    if not bool(taken.all()) and not torch.equal(taken.sum(-1), allowed.sum(-1).clamp(max=kept)):
        return None
    if 0 < kept < columns:
        left = values[..., kept]
        if bool((((best[..., -1] == left) & (left != -torch.inf)) | left.isnan()).any()):
            return None
    return torch.where(taken, pack(rank_of(best), place.expand_as(scores).gather(-1, at[..., :kept])), NOTHING)
