"""The registered ops of ``triton`` and their autograd Function.  Saved: x, weight, all scores, the selection."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.autocast import without_autocast
from kernel_index.core.triton import launch
from kernel_index.kernels.experts.expert_router.contract import Call
from kernel_index.kernels.experts.expert_router.reference import weights_reference


def _allocate(x, weight, bias, topk, scores):
    tokens, count = x.shape[0], weight.shape[0]
    return (
        x.new_empty((tokens, topk), dtype=torch.int64),
        x.new_empty((tokens, topk), dtype=torch.float32),
        x.new_empty((count,), dtype=torch.int64),
        x.new_empty((tokens, count), dtype=torch.float32),
    )


def _launch(x, weight, bias, topk, scores):
    from kernel_index.kernels.experts.expert_router import triton

    outputs = _allocate(x, weight, bias, topk, scores)
    x, weight, bias = launch.dense((x, weight, bias))
    triton.forward(x, weight, bias, scores == "softmax", outputs)
    return outputs


def _allocate_gradients(d_weights, x, weight, scores_NE, experts, softmax):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))


def _launch_backward(d_weights, x, weight, scores_NE, experts, softmax):
    from kernel_index.kernels.experts.expert_router import triton

    found = _allocate_gradients(d_weights, x, weight, scores_NE, experts, softmax)
    d_weights, x, weight, scores_NE, experts = launch.dense((d_weights, x, weight, scores_NE, experts))
    triton.backward(d_weights, x, weight, scores_NE, experts, softmax, *found)
    return found


_forward_op = ops.register(
    "expert_route(Tensor x, Tensor weight, Tensor? bias, SymInt topk, str scores) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "expert_route_backward(Tensor d_weights, Tensor x, Tensor weight, Tensor scores_NE, Tensor experts, bool softmax) "
    "-> (Tensor, Tensor)",
    _launch_backward,
    _allocate_gradients,
)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, topk: int, scores: str) -> tuple[Tensor, ...]:
        experts, weights, load, scores_NE = _forward_op(x, weight, bias, topk, scores)
        ctx.save_for_backward(x, weight, scores_NE, experts)
        ctx.topk, ctx.scores = topk, scores
        ctx.mark_non_differentiable(experts, load)
        return experts, weights, load

    @staticmethod
    def backward(ctx: Any, _: Any, d_weights: Tensor, __: Any) -> tuple[Tensor | None, ...]:
        x, weight, scores_NE, experts = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the reference's own gradient, which is differentiable
            with without_autocast(x):
                again = weights_reference(Call(x, weight, None, ctx.topk, ctx.scores), experts)
            wanted = [t for t, needs in zip((x, weight), ctx.needs_input_grad, strict=False) if needs]
            grads = iter(torch.autograd.grad(again, wanted, d_weights, create_graph=True))
            return *(next(grads) if needs else None for needs in ctx.needs_input_grad[:2]), None, None, None
        found = _backward_op(d_weights, x, weight, scores_NE, experts, ctx.scores == "softmax")
        d_x, d_weight = (g if needs else None for g, needs in zip(found, ctx.needs_input_grad, strict=False))
        return d_x, d_weight, None, None, None


def route_triton(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return ops.apply(_Route, *call)
