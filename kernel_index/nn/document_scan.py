"""Mamba-2's recurrence under ``numerics("invariant")``: chunks count from the start of each document.

A token's row is a function of its own chunk and of the state before that chunk.  A decoding step keeps the operands of
the open chunk and computes its rows by the same products, so it has the bits of the whole sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernel_index.core import stable
from kernel_index.core.products import batch_product


class Operands(NamedTuple):
    """Of the scan, float32: x [..., H, P] times its step, log_a [..., H], b and c [..., G, N]."""

    x: Tensor
    log_a: Tensor
    b: Tensor
    c: Tensor

    def flat(self) -> "Operands":
        """Of [B, T, …], the tokens [B·T, …]."""
        return Operands(*(t.flatten(0, 1) for t in self))

    def at(self, index: Tensor) -> "Operands":
        """Tokens of [n, …] by index, −1 for a padding token: it neither decays the state nor adds to it."""
        real = index >= 0
        return Operands(*(_padded(t.index_select(0, index.clamp(min=0).flatten()), real) for t in self))


def _padded(t: Tensor, real: Tensor) -> Tensor:
    t = t.unflatten(0, real.shape)
    return torch.where(real.view(*real.shape, *[1] * (t.ndim - real.ndim)), t, 0.0)


class Plan(NamedTuple):
    """Where tokens stand in chunks: ``index`` [D, chunks, size], −1 for padding, and ``place`` [n], the reverse."""

    index: Tensor
    place: Tensor


def plan_of(lengths: list[int], chunk: int, device: torch.device) -> Plan:
    """Consecutive documents of these lengths, each padded to whole chunks."""
    longest = max([*lengths, 1])
    chunks = -(-longest // chunk)
    index, first = torch.full((len(lengths), chunks * chunk), -1, device=device), 0
    place = [index.new_zeros(0)]
    for d, length in enumerate(lengths):
        index[d, :length] = torch.arange(first, first + length, device=device)
        place.append(d * chunks * chunk + torch.arange(length, device=device))
        first += length
    return Plan(index.unflatten(1, (chunks, chunk)), torch.cat(place))


def scan_documents(tokens: Operands, plan: Plan, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y [n, H, P] of the tokens [n, …], and the states before each chunk and after the last [D, chunks + 1, H, P, N].

    ``state`` [D, H, P, N] is that before the first chunk; None for zeros.
    """
    with torch.autocast(tokens.x.device.type, enabled=False):
        heads = tokens.x.shape[1]
        o = tokens.at(plan.index)  # [D, chunks, size, …]
        x, log_a = o.x.transpose(2, 3), o.log_a.transpose(2, 3)  # [D, chunks, H, size(, P)]
        b, c = (t.repeat_interleave(heads // t.shape[3], 3).transpose(2, 3) for t in (o.b, o.c))
        within, from_start = _decays(log_a)
        y = batch_product(batch_product(c, b) * within, x.transpose(-1, -2))
        left = within[..., -1, :]
        added = batch_product((x * left[..., None]).transpose(-1, -2), b.transpose(-1, -2))  # [D, chunks, H, P, N]
        states = [added.new_zeros(added[:, 0].shape) if state is None else state]
        for i in range(added.shape[1]):
            states.append(from_start[:, i, :, -1, None, None] * states[-1] + added[:, i])
        before = torch.stack(states[:-1], 1)
        y = y + batch_product(c * from_start[..., None], before)
        return y.transpose(2, 3).flatten(0, 2).index_select(0, plan.place), torch.stack(states, 1)


def _decays(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(Σ_{j<r≤i} log_a_r)`` [..., i, j], 0 above the diagonal, and ``exp(Σ_{r≤i} log_a_r)`` [..., i].

    Sums are made term by term, each of its own terms.
    """
    size = log_a.shape[-1]
    keep = torch.ones(size, size, dtype=torch.bool, device=log_a.device).tril()
    sums = torch.where(keep.tril(-1), log_a[..., :, None], 0.0).cumsum(-2)
    within = stable.with_gradient("exp", sums.masked_fill(~keep, -torch.inf))
    return within, stable.with_gradient("exp", log_a.cumsum(-1))


def silu(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * stable.with_gradient("sigmoid", wide)).to(x.dtype)


def lengths_of(segments: Tensor | None, rows: int, tokens: int) -> list[int]:
    """The lengths of all documents of a batch, row by row; reads values."""
    if segments is None:
        return [tokens] * rows
    found = []
    for row in segments.expand(rows, -1):
        ends = torch.cat(((row[1:] != row[:-1]).nonzero().flatten() + 1, row.new_tensor([tokens])))
        found += nn.functional.pad(ends, (1, 0)).diff().tolist()
    return found


Open = tuple[Tensor, ...]
"""x, log_a and b of the tokens since a state, [B, chunk, …], and how many there are, int64 [B]."""


def continued(
    operands: Operands, state: Tensor, open_: Open, counts: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Open]:
    """y [B, T, H, P] of the new tokens [B, T, …], the state at the last whole chunk, and the tokens since then.

    ``counts`` [B] are the real ones of the new tokens; None for all.
    """
    rows, tokens = operands.x.shape[:2]
    new = [tokens] * rows if counts is None else counts.tolist()
    old = open_[3].tolist() if open_ else [0] * rows
    without_c = operands.c.new_zeros(rows, chunk, *operands.c.shape[2:])  # of what is kept no row is asked for
    kept = (*(open_[:3] or operands[:3]), without_c)
    parts = [
        Operands(*(torch.cat((k[b, : old[b]], t[b, : new[b]])) for k, t in zip(kept, operands, strict=True)))
        for b in range(rows)
    ]
    plan = plan_of([len(part.x) for part in parts], chunk, operands.x.device)
    found, states = scan_documents(Operands(*map(torch.cat, zip(*parts, strict=True))), plan, state)
    y = torch.zeros_like(operands.x)
    left = [t.new_zeros(rows, chunk, *t.shape[2:]) for t in operands[:3]]
    first, whole = 0, [len(part.x) // chunk for part in parts]
    for b, part in enumerate(parts):
        y[b, : new[b]] = found[first + old[b] : first + len(part.x)]
        for kept_rows, t in zip(left, part, strict=False):
            kept_rows[b, : len(part.x) - whole[b] * chunk] = t[whole[b] * chunk :].detach()
        first += len(part.x)
    filled = torch.tensor([len(part.x) % chunk for part in parts], device=y.device)
    return y, states[torch.arange(rows, device=y.device), torch.tensor(whole, device=y.device)], (*left, filled)


class Paths(NamedTuple):
    """The paths of a prefix tree as documents of these ``lengths``.

    ``index`` [n] are places in the B·T tokens; ``own`` [n] is True in the last run of each path.
    """

    index: Tensor
    own: Tensor
    lengths: list[int]


def paths_of(levels: Sequence[Any]) -> Paths:
    """Of ``MaskContract.tree_levels``: the path of each run, from its root to its last token."""
    paths: list[Tensor] = []
    own: list[Tensor] = []
    for level in levels:
        for index, is_token, parent in zip(level.index, level.is_token, level.parent.tolist(), strict=True):
            before = paths[parent] if parent >= 0 else index[:0]
            paths.append(torch.cat((before, index[is_token])))
            own.append(torch.arange(len(paths[-1]), device=index.device) >= len(before))
    return Paths(torch.cat(paths), torch.cat(own), [len(path) for path in paths])
