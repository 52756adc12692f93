"""The specification: act(gate) · up in at least float32."""

import torch
from torch import Tensor

from kernel_index.kernels.experts.fused_gated_activation.activations import activation
from kernel_index.kernels.experts.fused_gated_activation.contract import Call


def gated_activation_reference(call: Call) -> Tensor:
    wide = torch.promote_types(call.gate.dtype, torch.float32)
    return (activation(call.gate.to(wide), call.kind) * call.up.to(wide)).to(call.gate.dtype).contiguous()
