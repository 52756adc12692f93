"""What happens to one chunk of logits: its losses, and its gradient in place.  Formulas only, see the README."""

import torch
from torch import Tensor


def _softmax_parts(z: Tensor, targets: Tensor, softcap: float, scale: float):
    """Capped logits, tanh, row maximum, Σe over the other classes, e of the target, and where the target is."""
    x = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    t = torch.tanh(x / softcap) if softcap else x
    x = softcap * t if softcap else x
    top = x.amax(-1, keepdim=True)
    e = torch.exp(x - top)
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    others = torch.where(is_target, 0.0, e).sum(-1, keepdim=True)
    own = torch.where(is_target, x, 0.0).sum(-1, keepdim=True) - top
    return x, t, top, e, others, own, is_target


def _losses(x: Tensor, top: Tensor, others: Tensor, own: Tensor, smoothing: float, z_loss: float):
    """(loss, lse) of each row.  With p near 1, log1p of the others keeps what log(Σ) − x would round away."""
    total = others + torch.exp(own)
    likelihood = torch.where(own == 0, torch.log1p(others), torch.log(total) - own)
    lse = top + torch.log(total)
    loss = (1 - smoothing) * likelihood
    if smoothing:
        loss = loss + smoothing * (lse - x.mean(-1, keepdim=True))
    if z_loss:
        loss = loss + z_loss * lse * lse
    return loss, lse, total


def loss_pass(z: Tensor, targets: Tensor, softcap: float, scale: float, smoothing: float, z_loss: float) -> Tensor:
    """Losses [rows] of a chunk of logits [rows, V]; rows with an ignored target hold a value nobody reads."""
    x, _, top, _, others, own, _ = _softmax_parts(z, targets, softcap, scale)
    return _losses(x, top, others, own, smoothing, z_loss)[0][:, 0]


def gradient_pass(
    z: Tensor, targets: Tensor, rows: Tensor, softcap: float, scale: float, smoothing: float, z_loss: float
) -> Tensor:
    """Losses [rows]; z is overwritten by the gradient of Σ rows·loss with respect to the logits before the scale."""
    x, t, top, e, others, own, is_target = _softmax_parts(z, targets, softcap, scale)
    loss, lse, total = _losses(x, top, others, own, smoothing, z_loss)
    # d = p − (1 − s)·onehot − s/V, where p − 1 of the target is −Σ(others)/Σ: no cancellation when p is near 1.
    d = torch.where(is_target, smoothing - others / total, e / total)
    if smoothing:
        d = d - smoothing / z.shape[1]
    if z_loss:
        d = d + 2 * z_loss * lse * e / total
    if softcap:
        d = d * (1 - t * t)
    z.copy_(torch.where(rows[:, None] == 0, 0.0, d * (rows[:, None] * scale)))
    return loss[:, 0]
