"""The parts, each of which chooses by itself; the activation is not kept for backward."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernel_index.kernels.experts.expert_dispatch.api import expert_combine
from kernel_index.kernels.experts.expert_mlp import composed
from kernel_index.kernels.experts.expert_mlp.contract import Call


def expert_mlp_parts(call: Call) -> Tensor:
    h_SF = composed.hidden(call.x, call.up, call.slots, call.offsets, "auto")
    if torch.is_grad_enabled():
        rows = checkpoint(composed.rows, call, h_SF, "auto", use_reentrant=False, preserve_rng_state=False)
    else:
        rows = composed.rows(call, h_SF, "auto")
    return expert_combine(rows, call.weights, call.slots, call.base)
