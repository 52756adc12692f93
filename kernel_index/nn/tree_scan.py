"""The state-space mixer over a prefix tree: a run begins with the state, and the inputs, that end the one before.

The runs of a level are rows of one call of the convolution and one of the scan, which are the kernels of plain rows.
"""

from collections.abc import Callable
from typing import Any

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
    parents = mask.tree_parents(B, T, device=inputs_BTC.device)
    segment = None if segments is None else segments.expand(B, -1).flatten()
    index = torch.cat([level.index.flatten() for level in levels] or [parents.new_zeros(0)])
    is_token = torch.cat([level.is_token.flatten() for level in levels] or [index.bool()])
    sizes = [level.index.numel() for level in levels]
    inputs, steps = (_of_runs(x, index, is_token).split(sizes) for x in (inputs_BTC, step_BTH))
    states, outputs = list[Tensor](), list[Tensor]()
    for level, x, step in zip(levels, inputs, steps, strict=True):
        own = None if segment is None else segment[level.index]
        x, step = (t.unflatten(0, level.index.shape) for t in (x, step))
        before = _inputs_before(inputs_BTC, taps - 1, level, parents, segment) if states else None
        state = _first_state(states, level, segment) if states else None
        step = step.masked_fill(~level.is_token[..., None], -torch.inf)  # a repeated token leaves the state as it is
        scanned = scan(convolve(x, own, before), step, own, state)
        states.append(scanned.state)
        outputs.append(scanned.y.flatten(0, 1))
    if not outputs:  # no token at all
        return scan(convolve(inputs_BTC, None, None), step_BTH, None, None).y.zero_()
    return _in_order(torch.cat(outputs), index, is_token, B * T).unflatten(0, (B, T))


def _of_runs(x_BT: Tensor, index: Tensor, is_token: Tensor) -> Tensor:
    """Tokens [n, …] of x [B, T, …]."""
    if rules.inside_functorch():  # it takes no autograd Function of this form
        return x_BT.flatten(0, 1)[index]
    return ops.apply(_OfRuns, x_BT.flatten(0, 1), index, is_token)


class _OfRuns(torch.autograd.Function):
    """``_of_runs``; a repeated token sends no gradient back, so that no sum is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, is_token: Tensor) -> Tensor:
        ctx.save_for_backward(index, is_token)
        ctx.tokens = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None, None]:
        index, is_token = ctx.saved_tensors
        return _in_order(d_x, index, is_token, ctx.tokens), None, None


def _in_order(x: Tensor, index: Tensor, is_token: Tensor, tokens: int) -> Tensor:
    """[tokens, …] with row i of x at ``index[i]``; a repeated token goes to one more row, which is dropped."""
    place = torch.where(is_token, index, tokens)
    return x.new_zeros(tokens + 1, *x.shape[1:]).index_copy(0, place, x)[:tokens]


def _inputs_before(inputs_BTC: Tensor, count: int, level: Any, parents: Tensor, segment: Tensor | None) -> Tensor:
    """The last ``count`` inputs [R, count, C] of the path before each run; zeros where its document begins later."""
    B, T = inputs_BTC.shape[:2]
    parent = parents.expand(B, -1).flatten()  # in its row, −1 for none
    at = level.before
    place = at.new_empty(len(at), count)
    for column in reversed(range(count)):
        place[:, column] = at
        before = torch.where(at >= 0, parent[at.clamp(min=0)], -1)
        at = torch.where(before >= 0, at // T * T + before, -1)
    found = _rows(inputs_BTC, place.clamp(min=0).flatten()).unflatten(0, place.shape)
    own = place >= 0
    if segment is not None:
        own = own & (segment[place.clamp(min=0)] == segment[level.index[:, :1]])
    return torch.where(own[..., None], found, 0.0)


def _rows(x_BT: Tensor, index: Tensor) -> Tensor:
    """Tokens [R, …] of x [B, T, …]; the gradient of one that several runs read is added up in float32, in order."""
    flat = x_BT.flatten(0, 1)
    return ki.gather_rows(flat[:, None].contiguous(), index)[:, 0]


def _first_state(states: list[Tensor], level: Any, segment: Tensor | None) -> Tensor:
    """The states that the runs of a level begin with; zeros where a document begins with the run."""
    state = torch.cat(states)
    state = ki.gather_rows(state.flatten(1)[:, None], level.parent).view(-1, *state.shape[1:])
    if segment is None:
        return state
    same = segment[level.index[:, 0]] == segment[level.before]
    return state * same[:, None, None, None]
