"""The op's autograd Function, shared by every compiled backend, and the registered ops of ``triton``."""

from typing import Any

import torch
from torch import Tensor, nn

from kernel_index.core import ops, stable
from kernel_index.kernels.experts.fused_gated_activation import inductor
from kernel_index.kernels.experts.fused_gated_activation.contract import Call


def _launch_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    from kernel_index.kernels.experts.fused_gated_activation import triton

    return triton.forward(gate, up, kind, _allocate(gate))


def _launch_backward(gate: Tensor, up: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from kernel_index.kernels.experts.fused_gated_activation import triton

    return triton.backward(gate, up, g, kind, (*_allocate_both(gate), None))[:2]


def _launch_all(gate: Tensor, up: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    from kernel_index.kernels.experts.fused_gated_activation import triton

    return triton.backward(gate, up, g, kind, _allocate_all(gate))


def _allocate(gate: Tensor, *_: Any) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _allocate_both(gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _allocate(gate), _allocate(gate)


def _allocate_all(gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(gate), _allocate(gate), _allocate(gate)


_all_op = ops.register(
    "gated_activation_backward_and_value(Tensor gate, Tensor up, Tensor g, str kind) -> (Tensor, Tensor, Tensor)",
    _launch_all,
    _allocate_all,
)

PASSES = {
    "triton": ops.Passes(
        ops.register("gated_activation(Tensor gate, Tensor up, str kind) -> Tensor", _launch_forward, _allocate),
        ops.register(
            "gated_activation_backward(Tensor gate, Tensor up, Tensor g, str kind) -> (Tensor, Tensor)",
            _launch_backward,
            _allocate_both,
        ),
    ),
    "inductor": ops.Passes(inductor.forward, inductor.backward),
    "native": ops.Passes(
        lambda gate, up, kind: inductor.gated(gate, up, kind, f=stable).contiguous(),
        lambda gate, up, g, kind: inductor.gradients(gate, up, g, kind, f=stable),
    ),
}


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.backend = kind, backend
        return PASSES[backend].forward(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            return *inductor.gradients(gate, up, g, ctx.kind), None, None
        return *PASSES[ctx.backend].backward(gate, up, g, ctx.kind), None, None


class _GatedLinear(torch.autograd.Function):
    """The activation and the linear layer behind it; what that reads is made again where the gradients are made."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up, weight, bias)
        ctx.kind = kind
        return nn.functional.linear(PASSES["triton"].forward(gate, up, kind), weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, bias = saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph: plain PyTorch, so that any further derivative exists too
            y = nn.functional.linear(inductor.gated(gate, up, ctx.kind), weight, bias)
            wanted = [t for t, n in zip(saved, needs, strict=True) if n]
            made = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            return *(next(made) if n else None for n in needs), None
        rows = g.reshape(-1, g.shape[-1])
        d_gate = d_up = None
        if needs[0] or needs[1]:
            d_gate, d_up, y = _all_op(gate, up, torch.mm(rows, weight).view(gate.shape), ctx.kind)
        else:
            y = PASSES["triton"].forward(gate, up, ctx.kind)
        d_weight = torch.mm(rows.T, y.view(-1, y.shape[-1])) if needs[2] else None
        d_bias = rows.sum(0) if needs[3] else None
        return d_gate if needs[0] else None, d_up if needs[1] else None, d_weight, d_bias, None


def gated_linear_triton(call: Call, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.apply(_GatedLinear, call.gate, call.up, weight, bias, call.kind)


def gated_activation_inductor(call: Call) -> Tensor:
    return ops.apply(_GatedActivation, *call, "inductor")


def gated_activation_native(call: Call) -> Tensor:
    """The formulas with functions whose bits do not depend on an element's place."""
    return ops.apply(_GatedActivation, *call, "native")


def gated_activation_triton(call: Call) -> Tensor:
    return ops.apply(_GatedActivation, *call, "triton")
