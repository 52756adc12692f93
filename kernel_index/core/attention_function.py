"""The one autograd Function of attention: ``(out, lse)`` from q, k, v and a sink, by the two passes of a backend.

The Function does what is the same for every attention: an unused output costs nothing, the other arguments have no
gradient, and a second differentiation is refused by name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.autocast import without_autocast


class Forward(NamedTuple):
    """``out`` [B, T, H, Dv], ``lse`` [B, H, T] by the natural logarithm, and the tensors that backward needs of it."""

    out: Tensor
    lse: Tensor
    saved: tuple[Tensor | None, ...]


class Backward(NamedTuple):
    """What a backward pass is given.

    ``d_out`` is zero where ``out`` was not used, ``d_lse`` [B, H, T] is None where ``lse`` was not.  ``saved`` are the
    tensors of ``Forward``; ``needs`` tells of q, k, v and sink which want a gradient.
    """

    d_out: Tensor
    d_lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    out: Tensor
    saved: Sequence[Tensor]
    needs: tuple[bool, ...]


class Gradients(NamedTuple):
    """Of q, k, v and the sink; None where there is no need."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sink: Tensor | None = None


class Passes(NamedTuple):
    """A backend of attention: ``forward(statics, q, k, v, sink, *tensors)`` and ``backward(statics, Backward)``.

    ``statics`` is one object without a gradient: sizes, scale, softcap, a plan.  Tensors that torch.compile has to see
    come one by one instead, since Dynamo and autograd see none inside an object.
    """

    name: str
    forward: Callable[..., Forward]
    backward: Callable[[Any, Backward], Gradients]


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, passes: Passes, statics: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, lse, saved = passes.forward(statics, q, k, v, sink, *tensors)
        ctx.save_for_backward(q, k, v, sink, out, *saved)
        ctx.passes, ctx.statics, ctx.others = passes, statics, len(tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{ctx.passes.name} cannot differentiate twice: use backend='reference'")
        q, k, v, sink, out, *saved = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        given = Backward(d_out, d_lse, q, k, v, sink, out, saved, ctx.needs_input_grad[2:6])
        with without_autocast(q):  # for a backward() that is called inside of it
            d_q, d_k, d_v, d_sink = ctx.passes.backward(ctx.statics, given)
        return None, None, d_q, d_k, d_v, d_sink, *[None] * ctx.others


def attend(
    passes: Passes, statics: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` with their gradients."""
    return ops.apply(AttentionFunction, passes, statics, q, k, v, sink, *tensors)


def delta_of(given: Backward) -> Tensor:
    """δ = Σ_d d_out · out − d_lse, [B, H, T], float32 at least: what every score gradient subtracts from dp."""
    wide = torch.promote_types(given.out.dtype, torch.float32)
    delta = (given.d_out.to(wide) * given.out).sum(-1).transpose(1, 2)
    return delta if given.d_lse is None else delta - given.d_lse


def sink_gradient(given: Backward, weight: Tensor, delta: Tensor) -> Tensor:
    """``weight`` [B, H, T] is the sink's part of each row's softmax, 0 in rows without keys; it has no value."""
    assert given.sink is not None
    return -(weight * delta).sum((0, 2)).to(given.sink.dtype)
