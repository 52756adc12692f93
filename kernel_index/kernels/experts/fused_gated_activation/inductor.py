"""Forward and backward as two compiled passes; only gate and up are saved."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.inductor import Region
from kernel_index.core.stable import PYTORCH
from kernel_index.kernels.experts.fused_gated_activation.activations import activation, slope


def gated(gate: Tensor, up: Tensor, kind: str, *, f: Any = PYTORCH) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (activation(gate.to(wide), kind, f) * up.to(wide)).to(gate.dtype)


def gradients(gate: Tensor, up: Tensor, g: Tensor, kind: str, *, f: Any = PYTORCH) -> tuple[Tensor, Tensor]:
    """Of gate and up."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, g = gate.to(wide), g.to(wide)
    d_gate, d_up = g * up.to(wide) * slope(x, kind, f), g * activation(x, kind, f)
    if kind in ("relu", "relu2"):  # by a select: 0 times an infinite gradient would be NaN
        d_gate = torch.where(gate <= 0, 0.0, d_gate)
    return d_gate.to(gate.dtype), d_up.to(gate.dtype)


_forward_region = Region(gated, gate=(0,), up=(0,))
_backward_region = Region(gradients, gate=(0,), up=(0,), g=(0,))


def forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _forward_region(gate.reshape(-1), up.reshape(-1), kind).view(gate.shape)


def backward(gate: Tensor, up: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _backward_region(gate.reshape(-1), up.reshape(-1), g.reshape(-1), kind)
    return d_gate.view(gate.shape), d_up.view(gate.shape)
