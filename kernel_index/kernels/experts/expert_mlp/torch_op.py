"""The registered ops of ``triton`` and their autograd Functions: PyTorch's grouped products between our passes.

Each half is a Function of its own, and the second one keeps its tensors in a node before it runs: a checkpoint that
recomputes the layer ends there, without the second product.
"""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.experts.expert_mlp.contract import Call
from kernel_index.kernels.experts.expert_mlp.reference import hidden_reference, output_reference
from kernel_index.kernels.experts.grouped_product.torch_op import grouped


def _rows(x: Tensor, slots: Tensor) -> Tensor:
    from kernel_index.kernels.experts.expert_dispatch import triton

    rows = x.new_empty((slots.numel(), x.shape[1]))
    triton.dispatch(x, slots, rows)
    return rows


def _active(h: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        from kernel_index.kernels.experts.fused_relu_squared import triton

        return triton.forward(h, torch.empty_like(h))
    from kernel_index.kernels.experts.fused_gated_activation import triton as gated

    gate, up = h.chunk(2, -1)
    return gated.forward(gate, up, "silu", h.new_empty(gate.shape))


def _allocate_hidden(x, up, slots, offsets):
    return x.new_empty((slots.numel(), up.shape[1]))


def _launch_hidden(x, up, slots, offsets):
    x, up, slots, offsets = launch.dense((x, up, slots, offsets))
    return grouped(_rows(x, slots), up.transpose(1, 2), offsets)


def _allocate_hidden_backward(d_h, x, up, slots, offsets, needs):
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, up), needs, strict=True))


def _launch_hidden_backward(d_h, x, up, slots, offsets, needs):
    from kernel_index.kernels.experts.expert_dispatch import triton

    d_x, d_up = _allocate_hidden_backward(d_h, x, up, slots, offsets, needs)
    d_h, x, up, slots, offsets = launch.dense((d_h, x, up, slots, offsets))
    if needs[0]:
        triton.combine(grouped(d_h, up, offsets), None, slots, None, d_x)
    if needs[1]:
        d_up = grouped(d_h.T, _rows(x, slots), offsets)
    return d_x, d_up


def _allocate_output(h, down, weights, slots, offsets, base, activation):
    return h.new_empty((slots.shape[0], down.shape[1]))


def _launch_output(h, down, weights, slots, offsets, base, activation):
    from kernel_index.kernels.experts.expert_dispatch import triton

    out = _allocate_output(h, down, weights, slots, offsets, base, activation)
    h, down, weights, slots, offsets, base = launch.dense((h, down, weights, slots, offsets, base))
    rows = grouped(_active(h, activation), down.transpose(1, 2), offsets)
    triton.combine(rows, weights, slots, base, out)
    return out


def _allocate_output_backward(g, h, down, weights, slots, offsets, needs):
    dense = torch.contiguous_format
    shapes = (h, down, weights)
    return tuple(
        torch.empty_like(t, memory_format=dense) if need or i == 2 else t.new_empty((0,))
        for i, (t, need) in enumerate(zip(shapes, needs, strict=True))
    )


def _launch_output_backward(g, h, down, weights, slots, offsets, needs):
    """The rows of g have no weights in them: the product's results get those, and give the weights' gradient."""
    from kernel_index.kernels.experts.expert_mlp import triton

    _, d_down, d_weights = _allocate_output_backward(g, h, down, weights, slots, offsets, needs)
    g, h, down, weights, slots, offsets = launch.dense((g, h, down, weights, slots, offsets))
    g_rows = _rows(g, slots)
    d_active = grouped(g_rows, down, offsets)
    d_h, active = torch.empty_like(h), torch.empty_like(d_active)
    triton.between(h, d_active, weights, slots, (d_h, active, d_weights))
    if needs[1]:
        d_down = grouped(g_rows.T, active, offsets)
    return d_h if needs[0] else h.new_empty((0,)), d_down, d_weights


_hidden_op = ops.register(
    "expert_hidden(Tensor x, Tensor up, Tensor slots, Tensor offsets) -> Tensor", _launch_hidden, _allocate_hidden
)
_hidden_backward_op = ops.register(
    "expert_hidden_backward(Tensor d_h, Tensor x, Tensor up, Tensor slots, Tensor offsets, bool[] needs) "
    "-> (Tensor, Tensor)",
    _launch_hidden_backward,
    _allocate_hidden_backward,
)
_output_op = ops.register(
    "expert_output(Tensor h, Tensor down, Tensor weights, Tensor slots, Tensor offsets, Tensor? base, str activation) "
    "-> Tensor",
    _launch_output,
    _allocate_output,
)
_output_backward_op = ops.register(
    "expert_output_backward(Tensor g, Tensor h, Tensor down, Tensor weights, Tensor slots, Tensor offsets, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
    _launch_output_backward,
    _allocate_output_backward,
)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, up, slots, offsets)
        return _hidden_op(x, up, slots, offsets)

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor | None, ...]:
        x, up, slots, offsets = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            return *_with_history(hidden_reference(x, up, slots, offsets), (x, up), needs, d_h), None, None
        found = _hidden_backward_op(d_h, x, up, slots, offsets, needs)
        return *(d if need else None for d, need in zip(found, needs, strict=True)), None, None


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
        return _output_op(h, down, weights, slots, offsets, base, activation)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = (ctx.nodes[0] if ctx.nodes else ctx).saved_tensors
        needs, d_base = list(ctx.needs_input_grad[1:4]), g if ctx.needs_input_grad[6] else None
        if torch.is_grad_enabled():
            h, down, weights, slots, offsets = saved
            call: Any = Call(h, h, down, weights, slots, offsets, None, ctx.activation)
            made = _with_history(output_reference(call, h), saved[:3], needs, g)
            return None, *made, None, None, d_base, None
        found = _output_backward_op(g, *saved, needs) if any(needs) else (None,) * 3
        return None, *(d if need else None for d, need in zip(found, needs, strict=True)), None, None, d_base, None


def _with_history(y: Tensor, inputs: tuple[Tensor, ...], needs: list[bool], g: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    made = iter(torch.autograd.grad(y, wanted, g, create_graph=True) if wanted else ())
    return tuple(next(made) if need else None for need in needs)


def expert_mlp_triton(call: Call) -> Tensor:
    x, up, down, weights, slots, offsets, base, activation = call
    h = ops.apply(_Hidden, x, up, slots, offsets)
    nodes: list[Any] = []
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (h, down, weights))
    if wants and not torch.compiler.is_compiling():
        h, down, weights = ops.apply(_Kept, nodes, h, down, weights, slots, offsets)
    return ops.apply(_Output, nodes, h, down, weights, slots, offsets, base, activation)
