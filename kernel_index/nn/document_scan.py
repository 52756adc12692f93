"""Mamba-2's recurrence under ``numerics("invariant")``: chunks count from the start of each document.

A token's row is a function of its own chunk and of the state before that chunk.  A decoding step keeps the operands of
the open chunk and computes its rows by the same products, so it has the bits of the whole sequence.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import stable
from kernel_index.core.numerics import needs_ordinary_numerics
from kernel_index.core.products import batch_product
from kernel_index.core.rows import taken
from kernel_index.nn import device_scan
from kernel_index.nn.residual import Branch, invariant_norm

if TYPE_CHECKING:
    from kernel_index.nn.state_space import Mamba2, MixerState


def mixed_by_documents(
    layer: "Mamba2", x_BTC: Tensor, mask: "ki.MaskContract | None", cache: "MixerState | None"
) -> Branch:
    """``Mamba2.forward`` by functions and products whose rows do not depend on each other."""
    rows, tokens = x_BTC.shape[:2]
    gate, inputs, step = layer.proj(x_BTC).split(layer.sizes, -1)
    ids = None if cache is not None or mask is None else mask.document_rows(tokens)
    if cache is None and mask is not None and mask.is_tree:
        if ids is not None:
            needs_ordinary_numerics("nn.Mamba2", "documents inside a prefix tree have no invariant form")
        y = _along_paths(layer, inputs, step, paths_of(mask.tree_levels(rows, tokens)))
    elif device_scan.has_kernels(x_BTC):
        y = _mixed_on_device(layer, inputs, step, mask, ids, cache)
    else:
        y = _mixed(layer, inputs, step, ids, cache)
    if device_scan.has_kernels(x_BTC):
        return layer.out(ki.gated_rms_norm(y.flatten(2), gate, layer.norm).to(x_BTC.dtype)), None
    y = y.flatten(2) * silu(gate.float())
    normed = invariant_norm(y, layer.norm, 1e-6)
    return layer.out(normed.to(x_BTC.dtype)), None


def no_tokens(layer: "Mamba2", like: Tensor) -> "Open":
    """What a state keeps before any token, for the rows of ``like``."""
    if device_scan.has_kernels(like):
        return device_scan.no_tokens(layer, like)
    kept = ((layer.heads, layer.head_dim), (layer.heads,), (layer.groups, layer.state))
    tokens = (like.new_zeros(len(like), layer.chunk, *shape) for shape in kept)
    return *tokens, like.new_zeros(len(like), dtype=torch.int64)


def _along_paths(layer: "Mamba2", inputs: Tensor, step: Tensor, paths: "Paths") -> Tensor:
    """Each path of a tree as a document, of which its last run is kept."""
    rows, tokens = inputs.shape[:2]
    if not paths.lengths:  # no token at all
        return (inputs[..., :1] * 0).expand(rows, tokens, layer.heads * layer.head_dim).unflatten(-1, (layer.heads, -1))
    inputs, step = (taken(t.flatten(0, 1), paths.index)[None] for t in (inputs, step))
    number = torch.arange(len(paths.lengths), device=inputs.device)
    ids = number.repeat_interleave(torch.tensor(paths.lengths, device=inputs.device))[None]
    on_device = device_scan.has_kernels(inputs)
    mix = device_scan.mixed(layer, inputs, step, None, ids) if on_device else _mixed(layer, inputs, step, ids, None)
    y = mix[0]
    gaps = y.new_zeros(rows * tokens, *y.shape[1:])
    return gaps.index_copy(0, paths.index[paths.own], y[paths.own]).unflatten(0, (rows, tokens))


def _mixed_on_device(
    layer: "Mamba2", inputs: Tensor, step: Tensor, mask: "ki.MaskContract | None", ids: Tensor | None,
    cache: "MixerState | None",
) -> Tensor:  # fmt: skip
    if cache is None:
        return device_scan.mixed(layer, inputs, step, mask, ids)
    y = device_scan.continued(layer, inputs, step, cache)
    joined = torch.cat([cache.conv.to(inputs.dtype), inputs], 1)
    with torch.inference_mode(False):
        cache.conv = _latest(joined, cache.counts, layer.width - 1).detach().to(cache.conv.dtype, copy=True)
    return y


def _mixed(layer: "Mamba2", inputs: Tensor, step: Tensor, ids: Tensor | None, cache: "MixerState | None") -> Tensor:
    """The convolution, the scan and the skip, float32 [B, T, H, P]; ``ids`` [B or 1, T] change between documents."""
    previous = inputs.new_zeros(len(inputs), layer.width - 1, inputs.shape[-1]) if cache is None else cache.conv
    joined = torch.cat([previous.to(inputs.dtype), inputs], 1)
    inner, shared = layer.heads * layer.head_dim, layer.groups * layer.state
    x, b, c = silu(_convolved(joined, layer.conv, ids)).split([inner, shared, shared], -1)
    x_BTHP = x.unflatten(-1, (layer.heads, layer.head_dim)).float()
    b_BTGN, c_BTGN = (t.unflatten(-1, (layer.groups, layer.state)).float() for t in (b, c))
    dt_BTH = stable.with_gradient("softplus", step.float() + layer.step_bias)
    log_a_BTH = -dt_BTH * stable.with_gradient("exp", layer.log_decay.float())
    operands = Operands(x_BTHP * dt_BTH[..., None], log_a_BTH, b_BTGN, c_BTGN)
    if cache is None:
        plan = plan_of(lengths_of(ids, *inputs.shape[:2]), layer.chunk, inputs.device)
        scanned = scan_documents(operands.flat(), plan)[0].view(x_BTHP.shape)
    else:
        scanned, state, left = continued(operands, cache.scan, cache.open, cache.counts, layer.chunk)
        with torch.inference_mode(False):  # states stay usable outside of it
            latest = _latest(joined, cache.counts, layer.width - 1).detach()
            cache.conv, cache.scan = latest.to(cache.conv.dtype, copy=True), state.detach().clone()
            cache.open = tuple(t.clone() for t in left)
    return scanned + layer.skip[:, None] * x_BTHP


def _convolved(joined: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    """``Σ_j w[j]·input[t − (width − 1) + j]`` over the inputs of t's own document, term by term in one order."""
    keep = weight.shape[0] - 1
    tokens = joined.shape[1] - keep
    out = weight[-1] * joined[:, keep:]
    for j in range(keep):
        earlier = weight[j] * joined[:, j : j + tokens]
        if ids is not None:
            same = ids[:, 1:] == ids[:, :-1]
            number = nn.functional.pad((~same).long().cumsum(-1), (1, 0))
            own = number == nn.functional.pad(number, (keep - j, 0), value=-1)[:, :tokens]
            earlier = torch.where(own[..., None], earlier, 0.0)
        out = out + earlier
    return out


def _latest(joined: Tensor, counts: Tensor | None, keep: int) -> Tensor:
    """The last inputs of each row, [B, keep, channels]."""
    if counts is None:
        return joined[:, joined.shape[1] - keep :]
    at = counts[:, None] + torch.arange(keep, device=joined.device)
    return joined.gather(1, at[..., None].expand(-1, -1, joined.shape[-1]))


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


def lengths_of(ids: Tensor | None, rows: int, tokens: int) -> list[int]:
    """The lengths of all documents of a batch, row by row; reads values."""
    if ids is None:
        return [tokens] * rows
    found = []
    for row in ids.expand(rows, -1):
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
    nothing = torch.zeros(0, dtype=torch.int64)
    return Paths(torch.cat(paths or [nothing]), torch.cat(own or [nothing.bool()]), [len(path) for path in paths])
