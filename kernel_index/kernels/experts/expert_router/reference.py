"""The specification: scores of all experts in float32, a stable sort, and the weights of the best."""

import torch
from torch import Tensor

from kernel_index.core import stable
from kernel_index.core.dtypes import compute_dtype
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.experts.expert_router.contract import SMALLEST_SUM, Call
from kernel_index.kernels.linear.linear.api import linear


def route_reference(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    scores_NE = _scores(call)
    keys_NE = scores_NE.detach() if call.bias is None else scores_NE.detach() + call.bias
    experts_Nk = keys_NE.sort(stable=True, dim=-1, descending=True).indices[:, : call.topk]
    weights_Nk = _weights(call, scores_NE, experts_Nk)
    every = torch.arange(call.weight.shape[0], device=experts_Nk.device)
    return experts_Nk, weights_Nk, (experts_Nk.reshape(-1, 1) == every).sum(0)


def weights_reference(call: Call, experts_Nk: Tensor) -> Tensor:
    """The weights of experts that are selected already."""
    return _weights(call, _scores(call), experts_Nk)


def _weights(call: Call, scores_NE: Tensor, experts_Nk: Tensor) -> Tensor:
    weights_Nk = scores_NE.gather(-1, experts_Nk)
    if call.topk > 1 or call.weight.shape[0] == 1:
        total_N = stable.sum_of(weights_Nk, -1) if is_invariant() else weights_Nk.sum(-1)
        weights_Nk = weights_Nk / total_N[:, None].clamp_min(SMALLEST_SUM)
    return weights_Nk


def _scores(call: Call) -> Tensor:
    """Float32 at least, [N, E]."""
    dtype = compute_dtype(call.x, call.weight)
    x, weight = call.x.to(dtype).contiguous(), call.weight.to(dtype).contiguous()
    if is_invariant():
        return stable.with_gradient(call.scores, linear(x, weight))
    logits_NE = x @ weight.T
    return logits_NE.sigmoid() if call.scores == "sigmoid" else logits_NE.softmax(-1)
