"""The autograd Function of the three mixing functions, and the registered ops of ``triton``.

It saves hidden and branch_out for backward only if a coefficient needs a gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops, stable
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton import launch
from kernel_index.kernels.streams.mhc_fused_static import inductor, native
from kernel_index.kernels.streams.mhc_fused_static.contract import STREAMS, Call, Rows, is_per_row

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


def _allocate_gradients(
    d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre, hidden_like, branch_like, wanted, sums=(COEFFICIENTS,)
):
    """``sums``: what is left of a coefficient's gradient, for each batch."""
    like = d_read if d_merged is None else d_merged
    batches, tokens, width = like.shape[0], like.shape[1], like.shape[-1]
    shapes = (batches, tokens, STREAMS, width), (batches, tokens, width), (batches, *sums)
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


def _triton_backward(upstream, saved, like, wanted):
    gradients = _backward_op(*upstream, *saved, *like, list(wanted))
    return tuple(g if w else None for g, w in zip(gradients, wanted, strict=True))


def _launch_rows(hidden, branch_out, h_post, h_res, h_pre):
    found = list(native.mix(hidden, branch_out, h_post, h_res, h_pre))
    merged = found.pop(0) if h_post is not None else hidden.new_empty((0,))
    return merged, found.pop(0) if h_pre is not None else hidden.new_empty((0,))


_rows_op = ops.NativeOp(
    "mhc_mix_rows(Tensor hidden, Tensor? branch_out, Tensor? h_post, Tensor? h_res, Tensor? h_pre) -> (Tensor, Tensor)",
    _launch_rows,
    _allocate,
)


def _allocate_rows_backward(d_merged, d_read, *rest):
    parts = COEFFICIENTS + 1 if rest[2] is not None else STREAMS  # of each token; without h_post those of h_pre alone
    tokens = (d_read if d_merged is None else d_merged).shape[1]
    return _allocate_gradients(d_merged, d_read, *rest, sums=(tokens, parts))


def _launch_rows_backward(d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre, hidden_like, branch_like, wanted):
    call = (d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre)
    outputs = _allocate_rows_backward(*call, hidden_like, branch_like, wanted)
    native.mix_backward(*call, outputs=outputs)
    return outputs


_rows_backward_op = ops.NativeOp(
    "mhc_mix_rows_backward(Tensor? d_merged, Tensor? d_read, Tensor? hidden, Tensor? branch_out, Tensor? h_post, "
    "Tensor? h_res, Tensor? h_pre, ScalarType hidden_like, ScalarType branch_like, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_rows_backward,
    _allocate_rows_backward,
)


def _native_backward(upstream, saved, like, wanted):
    """What ``inductor.gradients`` says, in one pass, and sums over tokens in a fixed order."""
    hidden, _, h_post, h_res, _ = saved
    wants = (wanted[0], wanted[1] and h_post is not None, wanted[2] and hidden is not None)
    found = _rows_backward_op(*upstream, *saved, *like, list(wants))
    d_hidden, d_branch, products = (t if want else None for t, want in zip(found, wants, strict=True))
    if products is not None:
        products = inductor.add_up(stable.column_sum(products.transpose(0, 1)), h_post, h_res)
    return d_hidden, d_branch, products


_PASSES = {
    "native": ops.Passes(_rows_op, _native_backward),
    "triton": ops.Passes(_forward_op, _triton_backward),
    "inductor": ops.Passes(inductor.forward, inductor.backward),
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
        merged, read = _PASSES[backend].forward(*_rows(hidden, branch_out, coefficients, ctx.batches))
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
        d_read = None if h_pre is None else upstream[0 if h_post is None else 1]
        needs = ctx.needs_input_grad
        if d_merged is None and d_read is None:
            return (None,) * 6
        saved = _rows(hidden, branch_out, coefficients, ctx.batches)
        flat = _flat(d_merged, ctx.batches, 2), _flat(d_read, ctx.batches, 1)
        backward = inductor.backward if torch.is_grad_enabled() else _PASSES[ctx.backend].backward
        d_hidden, d_branch, sums = backward(flat, saved, ctx.like, (needs[0], needs[1], any(needs[2:5])))
        d_hidden = None if d_hidden is None else d_hidden.view(ctx.shape)
        d_branch = None if d_branch is None else d_branch.view(*ctx.shape[:-2], ctx.shape[-1])
        return d_hidden, d_branch, *_split(sums, coefficients, needs[2:5]), None


def _split(sums: Tensor | None, coefficients: list[Tensor | None], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """``[batches, 24]`` into the gradients of the coefficients; one that all batches share adds them up."""
    if sums is None:
        return [None] * 3
    found: list[Tensor | None] = []
    gradients = sums.split([STREAMS, STREAMS**2, STREAMS], 1)
    for gradient, value, rank, need in zip(gradients, coefficients, (1, 2, 1), needs, strict=True):
        if value is None or not need:
            found.append(None)
            continue
        total = gradient if is_per_row(value, rank) else gradient.sum(0)
        found.append(total.reshape(value.shape).to(value.dtype))
    return found


def _flat(t: Tensor | None, batches: int, trailing: int) -> Tensor | None:
    """``[batches, N, …]``, the last ``trailing`` dimensions kept."""
    if t is None:
        return None
    kept = t.shape[-trailing:]
    return t.reshape(batches, math.prod(t.shape[:-trailing]) // max(1, batches), *kept)


def _rows(hidden: Tensor | None, branch_out: Tensor | None, coefficients: Any, batches: int) -> Rows:
    """A coefficient has one row for every batch, or a single row."""
    ranks = (1, 2, 1)
    rows = (c if c is None or is_per_row(c, rank) else c[None] for c, rank in zip(coefficients, ranks, strict=True))
    return Rows(_flat(hidden, batches, 2), _flat(branch_out, batches, 1), *rows)


def mix_native(call: Call) -> tuple[Tensor, ...]:
    return ops.apply(_Mix, *call, "native") if is_invariant() else native.mix_native(call)


def mix_inductor(call: Call) -> tuple[Tensor, ...]:
    return ops.apply(_Mix, *call, "inductor")


def mix_triton(call: Call) -> tuple[Tensor, ...]:
    if is_invariant():  # which takes coefficients of any dtype
        h_post, h_res, h_pre = (None if c is None else c.to(torch.float32) for c in call[2:])
        call = call._replace(h_post=h_post, h_res=h_res, h_pre=h_pre)
    return ops.apply(_Mix, *call, "triton")
