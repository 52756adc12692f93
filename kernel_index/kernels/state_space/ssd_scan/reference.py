"""The specification in chunks: three products of matrices for each, and the states carried from chunk to chunk."""

import torch
from torch import Tensor, nn

from kernel_index.core import rules
from kernel_index.core.dtypes import compute_dtype
from kernel_index.core.excluded import all_finite
from kernel_index.kernels.state_space.ssd_scan.contract import Call

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""dt · x [B, T, H, P], log-decays [B, T, H], b and c [B, T, G, N], all float32 at least."""


def ssd_scan_reference(call: Call) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(*call)
    x, dt, a, b, c = (t.to(wide) for t in call[:5])
    dt = dt if call.dt_bias is None else dt + call.dt_bias
    dt = nn.functional.softplus(dt) if call.dt_softplus else dt
    state = None if call.state is None else call.state.to(wide)
    operands = x * dt[..., None], dt * a, b, c
    if x.shape[1] == 1:
        y, last = _one_token(operands, state)
    elif rules.host_readable(*operands, state) and not _finite(*operands, state):
        y, last = one_by_one(operands, call.segments, state)
    else:
        y, last = in_chunks(operands, call.segments, state, call.chunk)
    y = y if call.d is None else y + call.d.to(wide)[:, None] * x
    return y.to(call.x.dtype).contiguous(), last.contiguous()


def _finite(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None and t.numel()]
    return not given or all_finite(*given)


def in_chunks(operands: Operands, segments: Tensor | None, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """y [B, T, H, P] and the last state; between two segments every factor is exactly 0."""
    T, heads = operands[0].shape[1:3]
    size = min(chunk, T)
    pad = -T % size
    # A padding token neither decays the state (log-decay 0) nor adds to it (x 0), and belongs to the last segment.
    x, log_a, b, c = (_chunks(t, size, pad) for t in operands)
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
    return y.transpose(2, 3).flatten(1, 2)[:, :T], last


def one_by_one(operands: Operands, segments: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token after token, where something is not finite: 0 times it would reach tokens that may not see it."""
    B, T, heads, P = operands[0].shape
    state = operands[0].new_zeros(B, heads, P, operands[2].shape[-1]) if state is None else state
    rows = []
    for t in range(T):
        if segments is not None and t:
            same = segments[:, t] == segments[:, t - 1]
            state = torch.where(same[:, None, None, None], state, 0.0)
        y, state = _step(tuple(x[:, t] for x in operands), state)
        rows.append(y)
    return torch.stack(rows, 1), state


def _one_token(operands: Operands, state: Tensor | None) -> tuple[Tensor, Tensor]:
    x, _, b, _ = operands
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]) if state is None else state
    y, state = _step(tuple(t[:, 0] for t in operands), state)
    return y[:, None], state


def _step(operands: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row: x [B, H, P], log-decays [B, H], b and c [B, G, N], the state [B, H, P, N]."""
    groups = operands[2].shape[1]  # heads of a group broadcast against its b and c
    x, log_a, state = (t.unflatten(1, (groups, -1)) for t in (*operands[:2], state))
    b, c = (t[:, :, None] for t in operands[2:])
    state = log_a.exp()[..., None, None] * state + x[..., None] * b[..., None, :]
    return (state @ c[..., None]).squeeze(-1).flatten(1, 2), state.flatten(1, 2)


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
    first = torch.zeros_like(after[:, :1]) if state is None else state[:, None]
    if state is not None:
        _, decay = _from_start(totals_BHc, None if same is None else same.from_first)
        after = after + decay.transpose(1, 2)[..., None, None] * first
    return torch.cat([first, after[:, :-1]], 1), after[:, -1]
