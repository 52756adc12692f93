"""The one autograd Function of attention: ``(out, lse)`` from q, k, v and a sink, by the two passes of a backend.

The Function does what is the same for every attention: an unused output costs nothing, the other arguments have no
gradient, and a second differentiation is refused by name.
"""

import math
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


# A sink beside kernels that know none


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit of each row, without a value: scales ``out`` [B, T, H, Dv] in place.

    Every weight of a row becomes ``exp(lse) / (exp(lse) + exp(sink))`` of itself.  A backward pass that is given the
    new ``out`` and the new log-sum-exp is right as it stands: its weights are those of the longer row, and so is δ.
    A row without keys keeps 0 and −inf.

    Returns:
        The new log-sum-exp, and the factor; [B, H, T], as ``lse``.
    """
    logit, empty = sink.to(lse.dtype)[:, None], lse.isneginf()
    share = torch.sigmoid(lse - logit).masked_fill(empty, 1.0)
    out.mul_(share.transpose(1, 2)[..., None])
    return torch.where(empty, lse, torch.logaddexp(lse, logit)), share


def gradient_of_sink(given: Backward, lse: Tensor, delta: Tensor) -> Tensor | None:
    """From ``lse`` with the sink in it and δ, [B, H, T]; None where there is no need."""
    if given.sink is None or not given.needs[3]:
        return None
    empty = lse.isneginf()
    weight = torch.exp(given.sink.to(lse.dtype)[:, None] - lse).masked_fill(empty, 0.0)
    return sink_gradient(given, weight, delta.masked_fill(empty, 0.0))


def _allocate_sink(out: Tensor, log2_sum: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(log2_sum)


def _launch_sink(out: Tensor, log2_sum: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    from kernel_index.core.triton import sinks

    return sinks.add_sink(out, log2_sum, sink.contiguous(), _allocate_sink(out, log2_sum, sink))


_sink_op = ops.register(
    "attention_sink(Tensor out, Tensor log2_sum, Tensor sink) -> (Tensor, Tensor)", _launch_sink, _allocate_sink
)
"""What ``add_sink`` does, in one launch."""


def forward_by_log2(out: Tensor, log2_sum: Tensor, sink: Tensor | None, *saved: Tensor | None) -> Forward:
    """Of a kernel that gives the log-sum-exp by base 2, [B, T, H], and knows no sink."""
    if sink is not None:
        out, log2_sum = _sink_op(out, log2_sum, sink)
    return Forward(out, (log2_sum * math.log(2)).transpose(1, 2).contiguous(), (log2_sum, *saved))


def sink_gradient_by_log2(given: Backward, delta: Tensor) -> Tensor | None:
    """From what ``forward_by_log2`` saved, and δ [B, T, H]."""
    if given.sink is None or not given.needs[3]:
        return None
    return gradient_of_sink(given, given.saved[0].transpose(1, 2) * math.log(2), delta.transpose(1, 2))
