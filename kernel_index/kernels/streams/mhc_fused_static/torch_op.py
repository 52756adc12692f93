"""The autograd Function behind the three mixing functions, and the registered ops behind ``triton``.

hidden and branch_out are kept for backward only if a coefficient learns.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.streams.mhc_fused_static import inductor
from kernel_index.kernels.streams.mhc_fused_static.contract import STREAMS, is_per_row

COEFFICIENTS = STREAMS + STREAMS**2 + STREAMS
"""h_post, h_res and h_pre of one batch row, in this order, wherever their gradients are one tensor."""


def _allocate(hidden, branch_out, h_post, h_res, h_pre):
    """What is not asked for is an empty tensor: an op's outputs have a fixed number."""
    batches, tokens, _, width = hidden.shape
    merged = hidden.new_empty(hidden.shape if h_post is not None else (0,))
    read = hidden.new_empty((batches, tokens, width) if h_pre is not None else (0,))
    return merged, read


def _launch(hidden, branch_out, h_post, h_res, h_pre):
    from kernel_index.kernels.streams.mhc_fused_static import triton

    call: Any = (hidden, branch_out, h_post, h_res, h_pre)
    outputs = _allocate(*call)
    triton.forward(outputs, *launch.dense(call))
    return outputs


def _allocate_gradients(d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre, hidden_like, branch_like, wanted):
    like = d_read if d_merged is None else d_merged
    batches, tokens, width = like.shape[0], like.shape[1], like.shape[-1]
    shapes = (batches, tokens, STREAMS, width), (batches, tokens, width), (batches, COEFFICIENTS)
    dtypes = hidden_like, branch_like, torch.float32
    return tuple(
        like.new_empty(shape if want else (0,), dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )


def _launch_backward(d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre, hidden_like, branch_like, wanted):
    from kernel_index.kernels.streams.mhc_fused_static import triton

    call = (d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre)
    like: Any = (hidden_like, branch_like, wanted)
    outputs = _allocate_gradients(*call, *like)
    triton.backward([o if w else None for o, w in zip(outputs, wanted, strict=True)], *launch.dense(call))
    return outputs


_forward_op = ops.register(
    "mhc_mix(Tensor hidden, Tensor? branch_out, Tensor? h_post, Tensor? h_res, Tensor? h_pre) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "mhc_mix_backward(Tensor? d_merged, Tensor? d_read, Tensor? hidden, Tensor? branch_out, Tensor? h_post, "
    "Tensor? h_res, Tensor? h_pre, ScalarType hidden_like, ScalarType branch_like, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_gradients,
)


def _triton_backward(*call):
    *tensors, like, wanted = call
    gradients = _backward_op(*tensors, *like, list(wanted))
    return tuple(g if w else None for g, w in zip(gradients, wanted, strict=True))


class _Passes(NamedTuple):
    forward: Any
    backward: Any


_PASSES = {
    "triton": _Passes(_forward_op, _triton_backward),
    "inductor": _Passes(inductor.forward, inductor.backward),
}


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        branch_out: Tensor | None,
        h_post: Tensor | None,
        h_res: Tensor | None,
        h_pre: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        coefficients = (h_post, h_res, h_pre)
        ctx.batches = hidden.shape[0] if any(map(is_per_row, coefficients, (1, 2, 1))) else 1
        flat = (_flat(hidden, ctx.batches, 2), _flat(branch_out, ctx.batches, 1))
        merged, read = _PASSES[backend].forward(*flat, *_rows(coefficients))
        kept = (hidden, branch_out) if any(ctx.needs_input_grad[2:5]) else (None, None)
        ctx.save_for_backward(*kept, *coefficients)
        ctx.like = hidden.dtype, (hidden if branch_out is None else branch_out).dtype
        ctx.shape, ctx.backend = hidden.shape, backend
        outputs = () if h_post is None else (merged.view(hidden.shape),)
        return outputs if h_pre is None else (*outputs, read.view(*hidden.shape[:-2], hidden.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, branch_out, *coefficients = ctx.saved_tensors
        h_post, _, h_pre = coefficients
        d_merged = None if h_post is None else upstream[0]
        d_read = None if h_pre is None else upstream[-1]
        needs = ctx.needs_input_grad
        if d_merged is None and d_read is None:
            return (None,) * 6
        saved = _flat(hidden, ctx.batches, 2), _flat(branch_out, ctx.batches, 1), *_rows(coefficients)
        flat = _flat(d_merged, ctx.batches, 2), _flat(d_read, ctx.batches, 1), *saved
        call: Any = (*flat, ctx.like, (needs[0], needs[1], any(needs[2:5])))
        if torch.is_grad_enabled():  # create_graph: the same formula, uncompiled, so that it is differentiable
            d_hidden, d_branch, parts = inductor.gradients(*call)
            sums = None if parts is None else inductor.add_up(parts, *call[4:6])
        else:
            d_hidden, d_branch, sums = _PASSES[ctx.backend].backward(*call)
        d_hidden = None if d_hidden is None else d_hidden.view(ctx.shape)
        d_branch = None if d_branch is None else d_branch.view(*ctx.shape[:-2], ctx.shape[-1])
        return d_hidden, d_branch, *_split(sums, coefficients, needs[2:5]), None


def _split(sums: Tensor | None, coefficients: list[Tensor | None], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """``[batches, 24]`` into the gradients of the coefficients; one that all batches share adds them up."""
    if sums is None:
        return [None] * 3
    found: list[Tensor | None] = []
    parts = sums.split([STREAMS, STREAMS**2, STREAMS], 1)
    for part, value, rank, need in zip(parts, coefficients, (1, 2, 1), needs, strict=True):
        if value is None or not need:
            found.append(None)
            continue
        own = part if is_per_row(value, rank) else part.sum(0)
        found.append(own.reshape(value.shape).to(value.dtype))
    return found


def _flat(t: Tensor | None, batches: int, trailing: int) -> Tensor | None:
    """``[batches, N, …]``, the last ``trailing`` dimensions kept."""
    if t is None:
        return None
    kept = t.shape[-trailing:]
    return t.reshape(batches, math.prod(t.shape[:-trailing]) // max(1, batches), *kept)


def _rows(coefficients: Any) -> list[Tensor | None]:
    """One row for every batch, or a single row."""
    ranks = (1, 2, 1)
    return [c if c is None or is_per_row(c, r) else c[None] for c, r in zip(coefficients, ranks, strict=True)]


def mix_inductor(*call: Any) -> tuple[Tensor, ...]:
    return _Mix.apply(*call, "inductor")


def mix_triton(*call: Any) -> tuple[Tensor, ...]:
    return _Mix.apply(*call, "triton")
