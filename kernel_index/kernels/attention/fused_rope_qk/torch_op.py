"""The op's autograd Function, shared by every compiled backend, and the registered op behind ``triton``.

Backward is the inverse rotation, and keeps cos and sin only.
"""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.fused_rope_qk import inductor


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


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        inverse: bool,
        backend: str,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.how = interleaved, inverse, backend
        return _PASSES[backend](q, k, cos, sin, interleaved, inverse)

    @staticmethod
    def backward(ctx: Any, gq: Tensor | None, gk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        interleaved, inverse, backend = ctx.how
        gq = gq if ctx.needs_input_grad[0] else None
        gk = gk if ctx.needs_input_grad[1] else None
        if gq is None and gk is None:
            return (None,) * 7
        dq, dk = _RopeQK.apply(gq, gk, cos, sin, interleaved, not inverse, backend)  # apply(): double backward
        return dq, dk, *(None,) * 5


def rope_qk_inductor(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _RopeQK.apply(q, k, cos, sin, interleaved, False, "inductor")


def rope_qk_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _RopeQK.apply(q, k, cos, sin, interleaved, False, "triton")
