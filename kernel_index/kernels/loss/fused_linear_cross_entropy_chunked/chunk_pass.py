"""What happens to one chunk of logits: its losses, and its gradient in place.  Formulas only, see the README."""

import math

import torch
from torch import Tensor


def _capped(z: Tensor, targets: Tensor, softcap: float, scale: float):
    """Capped logits, tanh, and where the target is."""
    x = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    t = torch.tanh(x / softcap) if softcap else x
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    return (softcap * t if softcap else x), t, is_target


def row_top(z: Tensor, softcap: float, scale: float) -> Tensor:
    """The maximum of each row of capped logits, [rows, 1]; −inf for a row without classes."""
    if z.shape[1] == 0:
        return torch.full(
            (z.shape[0], 1), -math.inf, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device
        )
    return _capped(z, z.new_zeros(z.shape[0], dtype=torch.int64), softcap, scale)[0].amax(-1, keepdim=True)


def row_sums(z: Tensor, targets: Tensor, top: Tensor, softcap: float, scale: float) -> Tensor:
    """[rows, 3]: Σ exp(x − top) over the classes but the target, the target's x (0 if it is not among them), Σ x."""
    x, _, is_target = _capped(z, targets, softcap, scale)
    others = torch.where(is_target, 0.0, torch.exp(x - top)).sum(-1)
    return torch.stack((others, torch.where(is_target, x, 0.0).sum(-1), x.sum(-1)), -1)


def row_losses(
    top: Tensor, sums: Tensor, smoothing: float, z_loss: float, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-sum-exp, 1 − p of the target), each [rows], from sums over all classes."""
    top, others, own, total_x = top[:, 0], *sums.unbind(-1)
    own = own - top
    total = others + torch.exp(own)
    # With p near 1, log1p of the others keeps what log(Σ) − x would round away.
    likelihood = torch.where(own == 0, torch.log1p(others), torch.log(total) - own)
    lse = top + torch.log(total)
    loss = (1 - smoothing) * likelihood
    if smoothing:
        loss = loss + smoothing * (lse - total_x / classes)
    if z_loss:
        loss = loss + z_loss * lse * lse
    return loss, lse, others / total


def loss_pass(
    z: Tensor, targets: Tensor, softcap: float, scale: float, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``row_losses`` of rows that hold all classes; ignored rows get values nobody reads."""
    top = row_top(z, softcap, scale)
    return row_losses(top, row_sums(z, targets, top, softcap, scale), smoothing, z_loss, z.shape[1])


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

    Apart from ``loss_pass`` and without a reduction, so that nothing of the chunk's size is held beside it: fused with
    the sums, the exponentials of a low-precision chunk would be stored in float32, at twice the chunk's bytes.
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
