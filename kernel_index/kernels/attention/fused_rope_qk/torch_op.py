"""The op's autograd Function, shared by every compiled backend, and the registered op of ``triton``.

Backward is the inverse rotation; only cos and sin are saved for it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.fused_rope_qk import inductor
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


_PASSES = {"triton": _triton, "inductor": inductor.rotate}


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


def rope_qk_inductor(call: Call) -> tuple[Tensor, Tensor]:
    return ops.apply(_RopeQK, call.q, call.k, call.cos, call.sin, _Rotation(call.interleaved, False, "inductor"))


def rope_qk_triton(call: Call) -> tuple[Tensor, Tensor]:
    return ops.apply(_RopeQK, call.q, call.k, call.cos, call.sin, _Rotation(call.interleaved, False, "triton"))
