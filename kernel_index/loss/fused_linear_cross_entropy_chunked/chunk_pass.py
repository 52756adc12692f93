"""What happens to one chunk of logits: its losses, and its gradient in place.  Formulas only, see the README."""

import torch
from torch import Tensor


def _capped(z: Tensor, targets: Tensor, softcap: float, scale: float):
    """Capped logits, tanh, and where the target is."""
    x = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    t = torch.tanh(x / softcap) if softcap else x
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    return (softcap * t if softcap else x), t, is_target


def _softmax_parts(z: Tensor, targets: Tensor, softcap: float, scale: float):
    """Capped logits, row maximum, Σe over the other classes, and the target's logit above the maximum."""
    x, _, is_target = _capped(z, targets, softcap, scale)
    top = x.amax(-1, keepdim=True)
    others = torch.where(is_target, 0.0, torch.exp(x - top)).sum(-1, keepdim=True)
    own = torch.where(is_target, x, 0.0).sum(-1, keepdim=True) - top
    return x, top, others, own


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


def loss_pass(
    z: Tensor, targets: Tensor, softcap: float, scale: float, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-sum-exp and 1 − p of the target, each [rows]; ignored rows hold values nobody reads."""
    x, top, others, own = _softmax_parts(z, targets, softcap, scale)
    loss, lse, total = _losses(x, top, others, own, smoothing, z_loss)
    return loss[:, 0], lse[:, 0], (others / total)[:, 0]


def gradient_pass(
    z: Tensor,
    targets: Tensor,
    rows: Tensor,
    lse: Tensor,
    missing: Tensor,
    softcap: float,
    scale: float,
    smoothing: float,
    z_loss: float,
) -> None:
    """z is overwritten by the gradient of Σ rows·loss with respect to the logits before the scale.

    Apart from ``loss_pass`` and without a reduction, so that nothing of the chunk's size is held beside it: fused with
    the sums, the exponentials of a low-precision chunk would be stored in float32, at twice the chunk's bytes.
    """
    x, t, is_target = _capped(z, targets, softcap, scale)
    p = torch.exp(x - lse[:, None])
    # d = p − (1 − s)·onehot − s/V, where p − 1 of the target is −missing: no cancellation when p is near 1.
    d = torch.where(is_target, smoothing - missing[:, None], p)
    if smoothing:
        d = d - smoothing / z.shape[1]
    if z_loss:
        d = d + 2 * z_loss * lse[:, None] * p
    if softcap:
        d = d * (1 - t * t)
    z.copy_(torch.where(rows[:, None] == 0, 0.0, d * (rows[:, None] * scale)))
