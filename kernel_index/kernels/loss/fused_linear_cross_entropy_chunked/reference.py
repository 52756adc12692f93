"""The specification: full logits in at least float32, plain autograd.  It holds all logits at once."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import Call, CrossEntropyOutput


def token_losses(call: Call) -> CrossEntropyOutput:
    """Loss, log-sum-exp and z-loss of each token, the shape of targets, 0 where the target is ignored."""
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
    lse = logits.logsumexp(-1)
    z_loss = torch.zeros_like(lse)
    if options.z_loss:
        z_loss = options.z_loss * lse.square()
        loss = loss + z_loss
    return CrossEntropyOutput(*(torch.where(valid, x, 0.0) for x in (loss, lse, z_loss)))


def reduce(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """``mean`` divides by the tokens that are not ignored; without any it is 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum().clamp(min=1)


def linear_cross_entropy_reference(call: Call) -> CrossEntropyOutput:
    weight: Any = call.weight
    bias: Any = call.bias
    if hasattr(weight, "full_tensor"):  # a shard: the specification gathers the weight
        call = call._replace(weight=weight.full_tensor(), bias=None if bias is None else bias.full_tensor())
    losses, lse, z_losses = token_losses(call)
    loss, z_loss = (
        reduce(x, call.targets, call.options.ignore_index, call.options.reduction) for x in (losses, z_losses)
    )
    return CrossEntropyOutput(loss, lse, z_loss)
