"""The op's autograd Functions, shared by every compiled backend, and the registered ops of ``triton``.

Backward of a rotation alone is the inverse rotation; only cos and sin are saved for it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.fused_rope_qk import inductor, native
from kernel_index.kernels.attention.fused_rope_qk.contract import Call


def _allocate(q, k, cos, sin, interleaved, inverse):
    """An output without its input is an empty tensor: an op's outputs have a fixed number."""
    return tuple(
        torch.empty((0,) if x is None else x.shape, dtype=cos.dtype if x is None else x.dtype, device=cos.device)
        for x in (q, k)
    )


def _launch(q, k, cos, sin, interleaved, inverse):
    from kernel_index.kernels.attention.fused_rope_qk import triton

    outputs = _allocate(q, k, cos, sin, interleaved, inverse)
    q, k, cos, sin = launch.dense((q, k, cos, sin))
    return triton.rotate(q, k, cos, sin, interleaved, inverse, outputs)


_op = ops.register(
    "rope_qk(Tensor? q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)


def _triton(q, k, cos, sin, interleaved, inverse):
    rotated = _op(q, k, cos, sin, interleaved, inverse)
    return tuple(None if x is None else y for x, y in zip((q, k), rotated, strict=True))


_rows_op = ops.NativeOp(
    "rope_qk_rows(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)",
    native.rotate,
    _allocate,
)


def _native(q, k, cos, sin, interleaved, inverse):
    """One of the two may be missing: it then has no heads."""
    present = k if q is None else q
    of_both = (present.new_empty(*present.shape[:2], 0, present.shape[3]) if x is None else x for x in (q, k))
    rotated = _rows_op(*of_both, cos, sin, interleaved, inverse)
    return tuple(None if x is None else y for x, y in zip((q, k), rotated, strict=True))


_PASSES = {"triton": _triton, "inductor": inductor.rotate, "native": _native}


class _Rotation(NamedTuple):
    """What a call has beside its tensors; ``inverse`` rotates backwards."""

    interleaved: bool
    inverse: bool
    backend: str


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        how: _Rotation,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.how = how
        return _PASSES[how.backend](q, k, cos, sin, how.interleaved, how.inverse)

    @staticmethod
    def backward(ctx: Any, gq: Tensor | None, gk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        gq = gq if ctx.needs_input_grad[0] else None
        gk = gk if ctx.needs_input_grad[1] else None
        if gq is None and gk is None:
            return (None,) * 5
        back = _Rotation(ctx.how.interleaved, not ctx.how.inverse, ctx.how.backend)
        dq, dk = ops.apply(_RopeQK, gq, gk, cos, sin, back)  # apply(): double backward
        return dq, dk, None, None, None


# The same after a norm of each head


def _launch_norm(q, k, cos, sin, q_weight, k_weight, eps, offset, interleaved):
    from kernel_index.kernels.attention.fused_rope_qk import triton

    outputs = _allocate(q, k, cos, sin, interleaved, False)
    tensors = launch.dense((q, k, cos, sin, q_weight, k_weight))
    return triton.norm_rotate(*tensors, eps=eps, offset=offset, interleaved=interleaved, outputs=outputs)


def _allocate_norm(q, k, cos, sin, q_weight, k_weight, eps, offset, interleaved):
    return _allocate(q, k, cos, sin, interleaved, False)


def _allocate_gradients(gq, gk, q, k, cos, sin, q_weight, k_weight, eps, offset, interleaved):
    """A gradient that there is none of is an empty tensor."""
    d_x = _allocate(gq, gk, cos, sin, interleaved, True)
    return *d_x, *(
        cos.new_empty((0,))
        if g is None or weight is None
        else torch.empty_like(weight, memory_format=torch.contiguous_format)
        for g, weight in ((gq, q_weight), (gk, k_weight))
    )


def _launch_norm_backward(gq, gk, q, k, cos, sin, q_weight, k_weight, eps, offset, interleaved):
    from kernel_index.kernels.attention.fused_rope_qk import triton

    tensors = (gq, gk, q, k, cos, sin, q_weight, k_weight)
    outputs = _allocate_gradients(*tensors, eps, offset, interleaved)
    tensors = launch.dense(tensors)
    triton.norm_backward(*tensors, eps=eps, offset=offset, interleaved=interleaved, outputs=outputs)
    return outputs


_WEIGHTS = "Tensor? q_weight, Tensor? k_weight, float eps, float weight_offset, bool interleaved"
_norm_op = ops.register(
    f"rope_qk_norm(Tensor q, Tensor k, Tensor cos, Tensor sin, {_WEIGHTS}) -> (Tensor, Tensor)",
    _launch_norm,
    _allocate_norm,
)
_norm_backward_op = ops.register(
    f"rope_qk_norm_backward(Tensor? gq, Tensor? gk, Tensor? q, Tensor? k, Tensor cos, Tensor sin, {_WEIGHTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _launch_norm_backward,
    _allocate_gradients,
)


def _triton_norm(q, k, cos, sin, q_weight, k_weight, norm):
    return _norm_op(q, k, cos, sin, q_weight, k_weight, *norm)


def _triton_norm_backward(gq, gk, q, k, cos, sin, q_weight, k_weight, norm):
    d_q, d_k, d_q_weight, d_k_weight = _norm_backward_op(gq, gk, q, k, cos, sin, q_weight, k_weight, *norm)
    there_is = (gq is not None, gk is not None)
    there_are = (there_is[0] and q_weight is not None, there_is[1] and k_weight is not None)
    found = zip((d_q, d_k, d_q_weight, d_k_weight), (*there_is, *there_are), strict=True)
    return tuple(d if there else None for d, there in found)


_NORM_PASSES = {
    "triton": ops.Passes(_triton_norm, _triton_norm_backward),
    "inductor": ops.Passes(inductor.norm_rotate, inductor.norm_backward),
}


class _NormRopeQK(torch.autograd.Function):
    """Of a tensor with a weight the tensor itself is saved; 1/rms is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        norm: inductor.Norm,
        backend: str,
    ) -> Any:
        ctx.set_materialize_grads(False)
        kept = (None if weight is None else x for x, weight in ((q, q_weight), (k, k_weight)))
        ctx.save_for_backward(*kept, cos, sin, q_weight, k_weight)
        ctx.norm, ctx.backend = norm, backend
        return _NORM_PASSES[backend].forward(q, k, cos, sin, q_weight, k_weight, norm)

    @staticmethod
    def backward(ctx: Any, gq: Tensor | None, gk: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        gq = gq if needs[0] or needs[4] else None
        gk = gk if needs[1] or needs[5] else None
        if gq is None and gk is None:
            return (None,) * 8
        arguments = (gq, gk, *ctx.saved_tensors)
        if torch.is_grad_enabled():  # create_graph: the same formula, uncompiled, so that it is differentiable
            d_q, d_k, *d_weights = inductor.gradients(*arguments, *ctx.norm)
        else:
            d_q, d_k, *d_weights = _NORM_PASSES[ctx.backend].backward(*arguments, ctx.norm)
        return d_q, d_k, None, None, *d_weights, None, None


def _apply(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    q, k, cos, sin, interleaved, q_weight, k_weight, eps, offset = call
    if call.norms:
        norm = inductor.Norm(eps, offset, interleaved)
        return ops.apply(_NormRopeQK, q, k, cos, sin, q_weight, k_weight, norm, backend)
    return ops.apply(_RopeQK, q, k, cos, sin, _Rotation(interleaved, False, backend))


def rope_qk_native(call: Call) -> tuple[Tensor, Tensor]:
    return _apply(call, "native") if is_invariant() else native.rope_qk_native(call)


def rope_qk_inductor(call: Call) -> tuple[Tensor, Tensor]:
    return _apply(call, "inductor")


def rope_qk_triton(call: Call) -> tuple[Tensor, Tensor]:
    return _apply(call, "triton")
