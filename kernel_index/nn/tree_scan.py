"""The state-space mixer over a prefix tree: each run begins with the state in which the run before it ended."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core import ops, rules

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""What ``ki.ssd_scan`` takes of each token: x, dt, b, c."""


def convolve_tree(inputs_BTC: Tensor, weight_JC: Tensor, mask: "ki.MaskContract", segments: Tensor | None) -> Tensor:
    """``Σ_j w[j]·input`` over the last tokens of each token's path, those of its own segment."""
    B, T, _ = inputs_BTC.shape
    out = weight_JC[-1] * inputs_BTC
    parent = mask.tree_parents(B, T, device=inputs_BTC.device)
    at = torch.arange(T, device=inputs_BTC.device).expand_as(parent)
    row = torch.arange(B, device=inputs_BTC.device)[:, None] * T
    for back in range(1, weight_JC.shape[0]):
        at = torch.where(at >= 0, parent.gather(1, at.clamp(min=0)), -1)
        place = at.clamp(min=0)
        own = at >= 0
        if segments is not None:
            own = own & (segments == segments.gather(1, place.expand(segments.shape[0], -1)))
        earlier = _rows(inputs_BTC, (row + place).flatten()).view_as(inputs_BTC)
        out = out + torch.where(own[..., None], weight_JC[-1 - back] * earlier, 0.0)
    return out


def scan_tree(
    scan: Callable[..., ki.Scanned], operands: Operands, mask: "ki.MaskContract", segments: Tensor | None
) -> Tensor:
    """``y`` of ``scan`` along each path, [B, T, H, P]; 0 in a gap.  One scan for each level of the tree.

    ``scan`` is ``ki.ssd_scan`` with a layer's own arguments, softplus among them; it takes what tokens have, segments
    and a state.
    """
    B, T = operands[0].shape[:2]
    segment = None if segments is None else segments.expand(B, -1).flatten()
    states, outputs, places = list[Tensor](), list[Tensor](), list[Tensor]()
    for level in mask.tree_levels(B, T, device=operands[0].device):
        x, step, b, c = (_of_runs(t, level) for t in operands)
        step = step.masked_fill(~level.is_token[..., None], -torch.inf)  # a repeated token leaves the state as it is
        own = None if segment is None else segment[level.index]
        state = _first_state(states, level, segment) if states else None
        scanned = scan(x, step, b, c, own, state)
        states.append(scanned.state)
        outputs.append(scanned.y.flatten(0, 1).index_select(0, level.tokens))
        places.append(level.index.flatten().index_select(0, level.tokens))
    if not outputs:  # no token at all
        return torch.zeros_like(operands[0])
    return _in_order(outputs, places, B * T).unflatten(0, (B, T))


def _of_runs(x_BT: Tensor, level: Any) -> Tensor:
    """Tokens [R, L, …] of x [B, T, …]."""
    if rules.inside_functorch():  # it takes no autograd Function of this form
        return x_BT.flatten(0, 1)[level.index]
    return ops.apply(_OfRuns, x_BT, level)


class _OfRuns(torch.autograd.Function):
    """``_of_runs``; a repeated token sends no gradient back, so that no sum is needed."""

    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, level: Any) -> Tensor:
        ctx.level, ctx.shape = level, x_BT.shape
        return x_BT.flatten(0, 1).index_select(0, level.index.flatten()).view(*level.index.shape, *x_BT.shape[2:])

    @staticmethod
    def backward(ctx: Any, d_RL: Tensor) -> tuple[Tensor, None]:
        level, tokens = ctx.level, ctx.level.tokens
        of_tokens = d_RL.flatten(0, 1).index_select(0, tokens)
        places = level.index.flatten().index_select(0, tokens)
        d_x = of_tokens.new_zeros(ctx.shape[0] * ctx.shape[1], *ctx.shape[2:]).index_copy(0, places, of_tokens)
        return d_x.view(ctx.shape), None


def _rows(x_BT: Tensor, index: Tensor) -> Tensor:
    """Tokens [R, …] of x [B, T, …]; the gradient of one that several runs read is added up in float32, in order."""
    flat = x_BT.flatten(0, 1)
    rows = flat.flatten(1) if flat.ndim > 1 else flat[:, None]
    return ki.gather_rows(rows[:, None].contiguous(), index).view(len(index), *flat.shape[1:])


def _first_state(states: list[Tensor], level: Any, segment: Tensor | None) -> Tensor:
    """The states that the runs of a level begin with; zeros where a document begins with the run."""
    state = torch.cat(states)
    state = ki.gather_rows(state.flatten(1)[:, None], level.parent).view(-1, *state.shape[1:])
    if segment is None:
        return state
    same = segment[level.index[:, 0]] == segment[level.before]
    return state * same[:, None, None, None]


def _in_order(outputs: list[Tensor], places: list[Tensor], tokens: int) -> Tensor:
    y, at = torch.cat(outputs), torch.cat(places)
    inverse = at.new_full((tokens,), at.shape[0])
    inverse[at] = torch.arange(at.shape[0], device=at.device)
    with_zeros = torch.cat([y, y.new_zeros(1, *y.shape[1:])])
    return with_zeros[inverse]
