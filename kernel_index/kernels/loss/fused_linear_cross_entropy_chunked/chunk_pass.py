"""The formulas of a pass over one chunk of logits: its losses, and its gradient in place.  The README derives them."""

import math

import torch
from torch import Tensor


def _capped(z: Tensor, targets: Tensor, softcap: float, scale: float):
    """Capped logits, tanh, and where the target is."""
    x = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    t = torch.tanh(x / softcap) if softcap else x
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    return (softcap * t if softcap else x), t, is_target


def row_max(z: Tensor, softcap: float, scale: float) -> Tensor:
    """The maximum of each row of capped logits, [rows, 1]; −inf for a row without classes."""
    if z.shape[1] == 0:
        return torch.full(
            (z.shape[0], 1), -math.inf, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device
        )
    return _capped(z, z.new_zeros(z.shape[0], dtype=torch.int64), softcap, scale)[0].amax(-1, keepdim=True)


def row_sums(z: Tensor, targets: Tensor, maxima: Tensor, softcap: float, scale: float) -> Tensor:
    """[rows, 3]: Σ exp(x − maximum) over the classes but the target, the target's x (0 if it is elsewhere), Σ x."""
    x, _, is_target = _capped(z, targets, softcap, scale)
    others = torch.where(is_target, 0.0, torch.exp(x - maxima)).sum(-1)
    return torch.stack((others, torch.where(is_target, x, 0.0).sum(-1), x.sum(-1)), -1)


def row_losses(
    maxima: Tensor, sums: Tensor, smoothing: float, z_loss: float, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-sum-exp, 1 − p of the target), each [rows], from sums over all classes."""
    row_max, others, target_x, sum_x = maxima[:, 0], *sums.unbind(-1)
    target_x = target_x - row_max
    row_sum = others + torch.exp(target_x)
    # With p near 1, log1p of the others keeps what log(Σ) − x would round away.
    likelihood = torch.where(target_x == 0, torch.log1p(others), torch.log(row_sum) - target_x)
    lse = row_max + torch.log(row_sum)
    loss = (1 - smoothing) * likelihood
    if smoothing:
        loss = loss + smoothing * (lse - sum_x / classes)
    if z_loss:
        loss = loss + z_loss * lse * lse
    return loss, lse, others / row_sum


def loss_pass(
    z: Tensor, targets: Tensor, softcap: float, scale: float, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``row_losses`` of rows that hold all classes; those of ignored rows are not used."""
    maxima = row_max(z, softcap, scale)
    return row_losses(maxima, row_sums(z, targets, maxima, softcap, scale), smoothing, z_loss, z.shape[1])


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
    classes: int,
) -> None:
    """z is overwritten by the gradient of Σ rows·loss with respect to the logits before the scale.

    It is apart from ``loss_pass`` and has no reduction, so that no second tensor of the chunk's size is held: fused
    with the sums, it would store the exponentials of a low-precision chunk in float32, at twice the chunk's bytes.
    """
    x, t, is_target = _capped(z, targets, softcap, scale)
    p = torch.exp(x - lse[:, None])
    # d = p − (1 − s)·onehot − s/V, where p − 1 of the target is −missing: no cancellation when p is near 1.
    d = torch.where(is_target, smoothing - missing[:, None], p)
    if smoothing:
        d = d - smoothing / classes
    if z_loss:
        d = d + 2 * z_loss * lse[:, None] * p
    if softcap:
        d = d * (1 - t * t)
    z.copy_(torch.where(rows[:, None] == 0, 0.0, d * (rows[:, None] * scale)))
