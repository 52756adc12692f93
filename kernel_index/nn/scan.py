"""The recurrence of Mamba-2, in chunks and one token at a time.

It is plain PyTorch.  It is not a kernel of the index yet: it has no contract, no choice of backends and no receipts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Scanned(NamedTuple):
    """``y`` [B, T, H, P] and the state after the last token [B, H, P, N], both float32 at least."""

    y: Tensor
    state: Tensor


def chunked_scan(
    x_BTHP: Tensor,
    log_a_BTH: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    *,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> Scanned:
    """The recurrence ``h_t = exp(log_a_t)·h_{t−1} + x_t ⊗ b_t``, ``y_t = h_t·c_t``, as products of matrices.

    Inside a chunk ``y_t = Σ_{s ≤ t} exp(Σ_{s<r≤t} log_a_r)·(c_t·b_s)·x_s``; the state after a chunk is carried to
    the later ones in the same way.  Everything is float32 at least, also under autocast.  Where ``segments`` changes,
    h starts from zero: the factor between two segments is exactly 0.

    Args:
        x_BTHP: inputs [B, T, H, P].
        log_a_BTH: [B, T, H], not positive.
        b_BTGN, c_BTGN: [B, T, G, N]; heads h of group ``h // (H/G)`` share them.
        segments: int [B or 1, T], non-decreasing; None for one segment.
        state: h before the first token, [B, H, P, N]; None for zeros.  It belongs to the first token's segment.
        chunk: tokens of a chunk.

    Source: Dao and Gu, "Transformers are SSMs", 2024, section 6.

    >>> import torch
    >>> x, log_a, one = torch.ones(1, 3, 1, 1), torch.full((1, 3, 1), 0.5).log(), torch.ones(1, 3, 1, 1)
    >>> chunked_scan(x, log_a, one, one).y.flatten()
    tensor([1.0000, 1.5000, 1.7500])
    >>> chunked_scan(x, log_a, one, one, segments=torch.tensor([[0, 1, 1]])).y.flatten()
    tensor([1.0000, 1.0000, 1.5000])
    """
    with torch.autocast(x_BTHP.device.type, enabled=False):
        wide = torch.promote_types(x_BTHP.dtype, torch.float32)
        T, heads = x_BTHP.shape[1:3]
        size = min(chunk, T)
        pad = -T % size
        # A padding token neither decays the state (log_a 0) nor adds to it (x 0), and belongs to the last segment.
        x, log_a, b, c = (_chunks(t.to(wide), size, pad) for t in (x_BTHP, log_a_BTH, b_BTGN, c_BTGN))
        b, c = (t.repeat_interleave(heads // t.shape[2], 2) for t in (b, c))  # all [B, chunks, H, size, ·]
        log_a = log_a.squeeze(-1)
        same = None if segments is None else _Same(_segment_chunks(segments, size, pad))
        within = _decays(log_a, None if same is None else same.tokens)
        y = ((c @ b.transpose(-1, -2)) * within) @ x
        left = within[..., -1, :]
        added = (x * left[..., None]).transpose(-1, -2) @ b  # each chunk's addition to the state, [B, chunks, H, P, N]
        totals, from_start = _from_start(log_a, None if same is None else same.from_start)
        before, last = _carry(added, totals, state, same)
        y = y + (c * from_start[..., None]) @ before.transpose(-1, -2)
        return Scanned(y.transpose(2, 3).flatten(1, 2)[:, :T], last)


def scan_step(x_BHP: Tensor, log_a_BH: Tensor, b_BGN: Tensor, c_BGN: Tensor, state_BHPN: Tensor) -> Scanned:
    """One token of the recurrence, as ``chunked_scan`` computes it; y is [B, H, P].

    >>> import torch
    >>> one = torch.ones(1, 1, 1)
    >>> scan_step(one, torch.full((1, 1), 0.5).log(), one, one, torch.ones(1, 1, 1, 1)).y.flatten()
    tensor([1.5000])
    """
    with torch.autocast(x_BHP.device.type, enabled=False):
        wide = torch.promote_types(x_BHP.dtype, torch.float32)
        groups = b_BGN.shape[1]  # heads of a group broadcast against its b and c
        x, log_a, state = (t.to(wide).unflatten(1, (groups, -1)) for t in (x_BHP, log_a_BH, state_BHPN))
        b, c = (t.to(wide)[:, :, None] for t in (b_BGN, c_BGN))
        state = log_a.exp()[..., None, None] * state + x[..., None] * b[..., None, :]
        return Scanned((state @ c[..., None]).squeeze(-1).flatten(1, 2), state.flatten(1, 2))


def _chunks(t: Tensor, size: int, pad: int) -> Tensor:
    """[B, T, H(, D)] to [B, chunks, H, size, D]."""
    t = t if t.ndim == 4 else t.unsqueeze(-1)
    t = nn.functional.pad(t, (0, 0, 0, 0, 0, pad))
    return t.unflatten(1, (-1, size)).transpose(2, 3)


def _segment_chunks(segments: Tensor, size: int, pad: int) -> Tensor:
    last = segments[:, -1:].expand(-1, pad)
    return torch.cat([segments, last], 1).unflatten(1, (-1, size))


class _Same:
    """Which pairs of tokens and of chunks are in one segment, as masks that broadcast over heads."""

    def __init__(self, at_BcQ: Tensor):
        ends = at_BcQ[..., -1]
        starts = torch.cat([at_BcQ[:, :1, 0], ends[:, :-1]], 1)  # the segment in which each chunk's incoming state ends
        self.tokens = (at_BcQ[..., :, None] == at_BcQ[..., None, :])[:, :, None]
        self.from_start = (at_BcQ == starts[..., None])[:, :, None]
        self.chunks = (ends[:, :, None] == ends[:, None, :])[:, None]
        self.from_first = (ends == at_BcQ[:, :1, 0])[:, None]


def _decays(log_a: Tensor, same: Tensor | None) -> Tensor:
    """``exp(Σ_{j<r≤i} log_a_r)`` [..., i, j]; exactly 0 above the diagonal and between segments.

    Each sum is made of its own terms.  A difference of two running sums would lose digits to the larger one, which also
    holds what decayed before j and in other documents.
    """
    size = log_a.shape[-1]
    keep = torch.ones(size, size, dtype=torch.bool, device=log_a.device).tril()
    keep = keep if same is None else keep & same
    sums = torch.where(keep.tril(-1), log_a[..., :, None], 0.0).cumsum(-2)
    return sums.masked_fill(~keep, -torch.inf).exp()


def _from_start(log_a: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over the last dimension: the total, and ``exp`` of the running sum at each index in the first segment."""
    own = log_a if same is None else torch.where(same, log_a, 0.0)
    sums = own.cumsum(-1)
    return sums[..., -1], sums.exp() if same is None else sums.exp() * same


def _carry(added: Tensor, totals_BcH: Tensor, state: Tensor | None, same: _Same | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk [B, chunks, H, P, N], and the one after the last."""
    totals_BHc = totals_BcH.transpose(1, 2)
    between = _decays(totals_BHc, None if same is None else same.chunks)
    after = torch.einsum("bhij,bjhpn->bihpn", between, added)
    first = torch.zeros_like(after[:, :1]) if state is None else state.to(after.dtype)[:, None]
    if state is not None:
        _, decay = _from_start(totals_BHc, None if same is None else same.from_first)
        after = after + decay.transpose(1, 2)[..., None, None] * first
    return torch.cat([first, after[:, :-1]], 1), after[:, -1]
