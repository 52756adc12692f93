"""The specification: full logits in at least float32, plain autograd.  It holds all logits at once."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import (
    Call,
    CrossEntropyOutput,
    StatsCall,
    StatsOptions,
    TokenStats,
)


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


def _whole(weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    """Of a shard the specification gathers the weight."""
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor(), None if bias is None else bias.full_tensor()
    return weight, bias


def token_stats_reference(call: StatsCall) -> TokenStats:
    """By the order of the classes: falling logits, the smaller index first among equals."""
    weight, bias = _whole(call.weight, call.bias)
    options = call.options
    dtype = torch.promote_types(call.hidden.dtype, torch.float32)
    logits = call.hidden.to(dtype) @ weight[: options.vocab].to(dtype).T
    if bias is not None:
        logits = logits + bias[: options.vocab].to(dtype)
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    # Relative to the largest, which stays finite at any temperature.
    log_p = ((logits - logits.detach().amax(-1, keepdim=True)) / options.temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(dtype).min)).sum(-1)
    order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, _kept_in_order(log_p.detach(), order, options))
    log_support = torch.zeros_like(entropy)
    if options.top_k or options.top_p < 1:
        dropped = torch.where(kept, 0.0, log_p.exp()).sum(-1)
        held = torch.where(kept, log_p, -torch.inf).logsumexp(-1)
        log_support = torch.where(dropped < 0.5, torch.log1p(-dropped.clamp(max=0.5)), held)
    valid = call.targets != options.ignore_index
    index = torch.where(valid, call.targets, 0).to(torch.int64)
    log_prob = log_p.gather(-1, index[..., None])[..., 0]
    log_prob, entropy, log_support = (torch.where(valid, x, 0.0) for x in (log_prob, entropy, log_support))
    return TokenStats(log_prob, entropy, log_support, order[..., 0].contiguous())


def _kept_in_order(log_p: Tensor, order: Tensor, options: StatsOptions) -> Tensor:
    """Of the classes in order, the first ``top_k``, while those before have less than ``top_p`` of their mass."""
    rank = torch.arange(log_p.shape[-1], device=log_p.device)
    largest = torch.where(rank < (options.top_k or log_p.shape[-1]), log_p.gather(-1, order), -torch.inf)
    p = largest.softmax(-1)
    return (largest > -torch.inf) & ((p.cumsum(-1) - p < options.top_p) | (rank == 0))


def linear_cross_entropy_reference(call: Call) -> CrossEntropyOutput:
    weight, bias = _whole(call.weight, call.bias)
    call = call._replace(weight=weight, bias=bias)
    losses, lse, z_losses = token_losses(call)
    loss, z_loss = (
        reduce(x, call.targets, call.options.ignore_index, call.options.reduction) for x in (losses, z_losses)
    )
    return CrossEntropyOutput(loss, lse, z_loss)
