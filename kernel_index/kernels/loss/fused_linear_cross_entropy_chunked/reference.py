"""The specification: full logits in at least float32, plain autograd.  It holds all logits at once."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import Call


def token_losses(call: Call) -> Tensor:
    """Loss of each token, the shape of targets, 0 where the target is ignored."""
    hidden, weight, targets, bias, options = call
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight[: options.vocab].to(dtype).T
    if bias is not None:
        logits = logits + bias[: options.vocab].to(dtype)
    logits = logits * options.logit_scale
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    valid = targets != options.ignore_index
    index = torch.where(valid, targets, 0).to(torch.int64)
    # Log-probabilities, not the log-sum-exp less a logit: an offset of all logits costs them no digits.
    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(-1, index[..., None])[..., 0]
    if options.label_smoothing:
        loss = (1 - options.label_smoothing) * loss - options.label_smoothing * log_p.mean(-1)
    if options.z_loss:
        loss = loss + options.z_loss * logits.logsumexp(-1).square()
    return torch.where(valid, loss, 0.0)


def reduce(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """``mean`` divides by the tokens that are not ignored; without any it is 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum().clamp(min=1)


def linear_cross_entropy_reference(call: Call) -> Tensor:
    weight: Any = call.weight
    bias: Any = call.bias
    if hasattr(weight, "full_tensor"):  # a shard: the specification gathers the weight
        call = call._replace(weight=weight.full_tensor(), bias=None if bias is None else bias.full_tensor())
    return reduce(token_losses(call), call.targets, call.options.ignore_index, call.options.reduction)
