"""The state-space mixer over a prefix tree: a run begins with the state, and the inputs, that end the one before.

The runs of a level are rows of one call of the convolution and one of the scan, which are the kernels of plain rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core import ops, rules

Convolve = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""``ki.causal_conv1d`` of a layer: of inputs [R, L, C], segments and the inputs before the first token."""

Scan = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], ki.Scanned]
"""``ki.ssd_scan`` of a layer: of what the convolution gives, raw steps [R, L, H], segments and a state."""


def mix_tree(
    convolve: Convolve,
    scan: Scan,
    taps: int,
    inputs_BTC: Tensor,
    step_BTH: Tensor,
    mask: "ki.MaskContract",
    segments: Tensor | None,
) -> Tensor:
    """``y`` of convolution and scan along each path, [B, T, H, P]; 0 in a gap.  Two calls for each level of the tree.

    Args:
        convolve: the layer's convolution over ``taps`` tokens.
        scan: the layer's scan; its softplus makes a step of 0 of −∞.
        taps: tokens that the convolution reads.
        inputs_BTC: what the convolution reads.
        step_BTH: raw step sizes.
        mask: a tree.
        segments: int [B or 1, T], the documents inside it, or None.
    """
    B, T = inputs_BTC.shape[:2]
    levels = mask.tree_levels(B, T, device=inputs_BTC.device)
    if not levels:  # no token at all
        return scan(convolve(inputs_BTC, None, None), step_BTH, None, None).y.zero_()
    key = (taps, B, T, inputs_BTC.device)
    runs, row, *paths = mask.remember("places of runs", key, lambda: _places(levels, B * T, taps - 1))
    segment = None if segments is None else segments.expand(B, -1).flatten()
    sizes = [level.index.numel() for level in levels]
    inputs, steps = (_moved(x.flatten(0, 1), runs, row).split(sizes) for x in (inputs_BTC, step_BTH))
    outputs, states, earlier_runs = list[Tensor](), None, 0  # states of the level before, and the runs before those
    for level, x, step, path in zip(levels, inputs, steps, paths, strict=True):
        own = None if segment is None else segment[level.index]
        x, step = (t.unflatten(0, level.index.shape) for t in (x, step))
        before, state = None, None
        if states is not None:
            before = _inputs_before(inputs_BTC, path, level, segment)
            state = _first_state(states, level.parent - earlier_runs, level, segment)
            earlier_runs += len(states)
        if not level.is_full:
            step = step.masked_fill(~level.is_token[..., None], -torch.inf)  # no token leaves the state as it is
        y, states = scan(convolve(x, own, before), step, own, state)
        outputs.append(y.flatten(0, 1))
    return _moved(torch.cat(outputs), row, runs).unflatten(0, (B, T))


class _Places(NamedTuple):
    """Rows ``index`` [n] of a tensor, in another order; zeros where ``is_row`` is False, nowhere if it is None."""

    index: Tensor
    is_row: Tensor | None


def _places(levels: Sequence[Any], tokens: int, count: int) -> tuple[Any, ...]:
    """From the B·T tokens to the runs of all levels, and back; and for each level ``count`` tokens before each run."""
    index = torch.cat([level.index.flatten() for level in levels])
    is_token = torch.cat([level.is_token.flatten() for level in levels])
    place = torch.where(is_token, index, tokens)
    back = index.new_full((tokens + 1,), -1).scatter(0, place, torch.arange(len(index), device=index.device))[:tokens]
    whole = all(level.is_full for level in levels)
    runs = _Places(index, None if whole else is_token)
    row = _Places(back.clamp(min=0), None if whole and len(index) == tokens else back >= 0)
    return runs, row, *_paths_before(levels, count)


def _paths_before(levels: Sequence[Any], count: int) -> list[Tensor]:
    """The last ``count`` tokens of the path before each run, int64 [R, count] for each level; −1 before a root."""
    first = torch.cat([level.index[:, 0] for level in levels])
    parent = torch.cat([level.parent for level in levels])
    before = torch.cat([level.before for level in levels])
    columns, at, run = list[Tensor](), before, parent
    for _ in range(count):
        columns.append(at)
        inside = at > first[run.clamp(min=0)]
        above = run.clamp(min=0)
        at = torch.where(inside, at - 1, torch.where(run < 0, -1, before[above]))
        run = torch.where(inside, run, torch.where(run < 0, -1, parent[above]))
    found = torch.stack(columns[::-1], 1) if columns else before.new_zeros(len(before), 0)
    return list(found.split([len(level.parent) for level in levels]))


def _moved(x: Tensor, to: _Places, back: _Places) -> Tensor:
    """Rows of x [m, …] at other places; the gradient comes back by ``back``, so that nothing is added up."""
    if rules.inside_functorch():  # it takes no autograd Function of this form
        return _at_places(x, to)
    return ops.apply(_Moved, x, to, back)


def _at_places(x: Tensor, to: _Places) -> Tensor:
    found = x.index_select(0, to.index)
    return found if to.is_row is None else found.masked_fill(~to.is_row[(..., *[None] * (x.ndim - 1))], 0)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to: _Places, back: _Places) -> Tensor:
        ctx.places = back, to
        return _at_places(x, to)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None, None]:
        return _moved(d_x, *ctx.places), None, None


def _inputs_before(inputs_BTC: Tensor, path: Tensor, level: Any, segment: Tensor | None) -> Tensor:
    """The inputs [R, count, C] of the tokens before each run; zeros where its document begins later."""
    found = _rows(inputs_BTC, path.clamp(min=0).flatten()).unflatten(0, path.shape)
    own = path >= 0
    if segment is not None:
        own = own & (segment[path.clamp(min=0)] == segment[level.index[:, :1]])
    return torch.where(own[..., None], found, 0.0)


def _rows(x_BT: Tensor, index: Tensor) -> Tensor:
    """Tokens [R, …] of x [B, T, …]; the gradient of one that several runs read is added up in float32, in order."""
    flat = x_BT.flatten(0, 1)
    return ki.gather_rows(flat[:, None].contiguous(), index)[:, 0]


def _first_state(states: Tensor, parent: Tensor, level: Any, segment: Tensor | None) -> Tensor:
    """The states that the runs of a level begin with; zeros where a document begins with the run."""
    state = ki.gather_rows(states.flatten(1)[:, None], parent).view(-1, *states.shape[1:])
    if segment is None:
        return state
    same = segment[level.index[:, 0]] == segment[level.before]
    return state * same[:, None, None, None]
