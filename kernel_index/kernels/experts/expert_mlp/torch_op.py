"""The registered ops of ``triton`` and their autograd Functions: grouped products between our passes.

Each half is a Function of its own, and the second one keeps its tensors in a node before it runs: a checkpoint that
recomputes the layer ends there, without the second product.
"""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton import launch
from kernel_index.kernels.experts.expert_mlp.contract import Call
from kernel_index.kernels.experts.expert_mlp.reference import hidden_reference, output_reference


def _op(name: str) -> Any:
    """A registered op of another function of this family."""
    return getattr(torch.ops.kernel_index, name).default


def _launched(name: str, *args: Tensor) -> Tensor:
    """The same where nothing would see it."""
    return ops.run(_op(name), ops.LAUNCHERS[f"kernel_index::{name}"], *args)


def grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return _op("grouped_product")(a, b, offsets)


def _product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows times the weight of their expert; in invariant numerics a row of it does not depend on the others."""
    if is_invariant():
        return _launched("device_grouped_rows", x, weight, offsets)
    return grouped(x, weight.transpose(1, 2), offsets)


def _d_input(d_y: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return (
        _launched("device_grouped_rows_d_input", d_y, weight, offsets)
        if is_invariant()
        else grouped(d_y, weight, offsets)
    )


def _d_weight(d_y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return _launched("device_grouped_rows_d_weight", d_y, x, offsets) if is_invariant() else grouped(d_y.T, x, offsets)


def _rows(x: Tensor, slots: Tensor) -> Tensor:
    return _op("expert_dispatch")(x, slots)


def _active(h: Tensor, activation: str) -> Tensor:
    return _op("relu_squared")(h) if activation == "relu2" else _op("gated_activation")(*h.chunk(2, -1), "silu")


def _allocate_between(h: Tensor, d_active: Tensor, weights: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, d_active, weights)]
    return found[0], found[1], found[2]


def _launch_between(h, d_active, weights, slots):
    from kernel_index.kernels.experts.expert_mlp import triton

    found = _allocate_between(h, d_active, weights, slots)
    h, d_active, weights, slots = launch.dense((h, d_active, weights, slots))
    triton.between(h, d_active, weights, slots, found)
    return found


_between_op = ops.register(
    "expert_activation_backward(Tensor h, Tensor d_active, Tensor weights, Tensor slots) -> (Tensor, Tensor, Tensor)",
    _launch_between,
    _allocate_between,
)


def _hidden(x: Tensor, up: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
    return _product(_rows(x, slots), up, offsets)


def _hidden_backward(d_h: Tensor, x: Tensor, up: Tensor, slots: Tensor, offsets: Tensor, needs: Any) -> list[Any]:
    d_x = _op("expert_combine")(_d_input(d_h, up, offsets), None, slots, None) if needs[0] else None
    return [d_x, _d_weight(d_h, _rows(x, slots), offsets) if needs[1] else None]


def _output_backward(
    g: Tensor, h: Tensor, down: Tensor, weights: Tensor, slots: Tensor, offsets: Tensor, needs: Any
) -> list[Any]:
    """The rows of g have no weights in them: the product's results get those, and give the weights' gradient."""
    g_rows = _rows(g, slots)
    d_h, active, d_weights = _between_op(h, _d_input(g_rows, down, offsets), weights, slots)
    d_down = _d_weight(g_rows, active, offsets) if needs[1] else None
    return [d_h if needs[0] else None, d_down, d_weights if needs[2] else None]


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, up, slots, offsets)
        return _hidden(x, up, slots, offsets)

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor | None, ...]:
        x, up, slots, offsets = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            return *_with_history(hidden_reference(x, up, slots, offsets), (x, up), needs, d_h), None, None
        return *_hidden_backward(d_h.contiguous(), x, up, slots, offsets, needs), None, None


class _Kept(torch.autograd.Function):
    """Keeps what the second half needs for backward, before it runs."""

    @staticmethod
    def forward(ctx: Any, nodes: list[Any], h: Tensor, down: Tensor, weights: Tensor, *order: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, down, weights, *order)
        nodes.append(ctx)
        return h.view_as(h), down.view_as(down), weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients, None, None


class _Output(torch.autograd.Function):
    """``nodes``: that of ``_Kept``; empty in a trace, where this function keeps the tensors itself."""

    @staticmethod
    def forward(ctx: Any, nodes: list[Any], h, down, weights, slots, offsets, base, activation: str) -> Tensor:
        ctx.nodes, ctx.activation = nodes, activation
        if not nodes:
            ctx.save_for_backward(h, down, weights, slots, offsets)
        rows = _product(_active(h, activation), down, offsets)
        return _op("expert_combine")(rows, weights, slots, base)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, down, weights, slots, offsets = (ctx.nodes[0] if ctx.nodes else ctx).saved_tensors
        needs, d_base = list(ctx.needs_input_grad[1:4]), g if ctx.needs_input_grad[6] else None
        if torch.is_grad_enabled():
            call: Any = Call(h, h, down, weights, slots, offsets, None, ctx.activation)
            found = _with_history(output_reference(call, h), (h, down, weights), needs, g)
        elif any(needs):
            found = _output_backward(g, h, down, weights, slots, offsets, needs)
        else:
            found = (None,) * 3
        return None, *found, None, None, d_base, None


def _with_history(y: Tensor, inputs: tuple[Tensor, ...], needs: list[bool], g: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    made = iter(torch.autograd.grad(y, wanted, g, create_graph=True) if wanted else ())
    return tuple(next(made) if need else None for need in needs)


def expert_mlp_triton(call: Call) -> Tensor:
    x, up, down, weights, slots, offsets, base, activation = call
    up, down, offsets = launch.dense((up, down, offsets))
    h = ops.apply(_Hidden, x, up, slots, offsets)
    nodes: list[Any] = []
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (h, down, weights))
    if wants and not torch.compiler.is_compiling():
        h, down, weights = ops.apply(_Kept, nodes, h, down, weights, slots, offsets)
    return ops.apply(_Output, nodes, h, down, weights, slots, offsets, base, activation)
