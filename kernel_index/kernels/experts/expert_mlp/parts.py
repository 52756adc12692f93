"""The public functions of the parts, each of which chooses by itself; the activation is not kept for backward."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernel_index.kernels.experts.expert_dispatch.api import expert_combine, expert_dispatch
from kernel_index.kernels.experts.expert_mlp.contract import Call
from kernel_index.kernels.experts.fused_gated_activation.api import fused_gated_activation
from kernel_index.kernels.experts.fused_relu_squared.api import fused_relu_squared
from kernel_index.kernels.experts.grouped_product.api import grouped_product


def expert_mlp_parts(call: Call) -> Tensor:
    h_SF = grouped_product(expert_dispatch(call.x, call.slots), call.up, call.offsets)
    if torch.is_grad_enabled():
        rows = checkpoint(_second_half, h_SF, call, use_reentrant=False, preserve_rng_state=False)
    else:
        rows = _second_half(h_SF, call)
    return expert_combine(rows, call.weights, call.slots, call.base)


def _second_half(h_SF: Tensor, call: Call) -> Tensor:
    if call.activation == "relu2":
        active = fused_relu_squared(h_SF)
    else:
        active = fused_gated_activation(*h_SF.chunk(2, -1))
    return grouped_product(active, call.down, call.offsets)
