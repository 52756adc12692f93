"""The registered ops of ``sinkhorn`` by Triton, and their autograd Function."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops, rules
from kernel_index.kernels.streams.mhc_fused_static.reference import sinkhorn_reference


def _allocate(logits, iters, temperature, eps, keep):
    n = logits.shape[-1]
    kept = (logits.shape[0], 2 * iters, n, n) if keep else (0,)
    return logits.new_empty(logits.shape, dtype=torch.float32), logits.new_empty(kept, dtype=torch.float32)


def _launch(logits, iters, temperature, eps, keep):
    from kernel_index.kernels.streams.mhc_fused_static import triton_sinkhorn

    out, kept = _allocate(logits, iters, temperature, eps, keep)
    triton_sinkhorn.forward(logits.contiguous(), out, kept, temperature, eps, iters)
    return out, kept


def _allocate_gradient(g, kept, temperature, dtype):
    return g.new_empty(g.shape, dtype=dtype)


def _launch_backward(g, kept, temperature, dtype):
    from kernel_index.kernels.streams.mhc_fused_static import triton_sinkhorn

    d_logits = _allocate_gradient(g, kept, temperature, dtype)
    triton_sinkhorn.backward(g.contiguous(), kept, temperature, d_logits)
    return d_logits


_forward_op = ops.register(
    "sinkhorn(Tensor logits, SymInt iters, float temperature, float eps, bool keep) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "sinkhorn_backward(Tensor g, Tensor kept, float temperature, ScalarType dtype) -> Tensor",
    _launch_backward,
    _allocate_gradient,
)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iters: int, temperature: float, eps: float) -> Tensor:
        out, kept = _forward_op(logits, iters, temperature, eps, True)
        ctx.save_for_backward(logits, kept)
        ctx.options = iters, temperature, eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        logits, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the reference's own gradient, which is differentiable
            iters, temperature, eps = ctx.options
            again = sinkhorn_reference(logits, iters, temperature, eps, "sums")
            return torch.autograd.grad(again, logits, g, create_graph=True)[0], None, None, None
        return _backward_op(g, kept, ctx.options[1], logits.dtype), None, None, None


def sinkhorn_triton(logits: Tensor, iters: int, temperature: float, eps: float, eps_in: str) -> Tensor:
    flat = logits.reshape(-1, *logits.shape[-2:])
    options = iters, float(temperature), float(eps)
    if rules.wants_gradient(logits):
        return ops.apply(_Sinkhorn, flat, *options).view(logits.shape)
    return _forward_op(flat, *options, False)[0].view(logits.shape)
