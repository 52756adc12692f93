"""The formulas of a pass over one chunk of logits: its losses, and its gradient in place.  The README derives them.

``f`` has the functions and sums: PyTorch's, or those of ``core.stable``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.stable import PYTORCH


def _capped(z: Tensor, targets: Tensor, softcap: float, scale: float, f: Any):
    """Capped logits, tanh, and where the target is."""
    x = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    t = f.tanh(x / softcap) if softcap else x
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    return (softcap * t if softcap else x), t, is_target


def row_max(z: Tensor, softcap: float, scale: float, *, f: Any = PYTORCH) -> Tensor:
    """The maximum of each row of capped logits, [rows, 1]; −inf for a row without classes."""
    if z.shape[1] == 0:
        return torch.full(
            (z.shape[0], 1), -math.inf, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device
        )
    return _capped(z, z.new_zeros(z.shape[0], dtype=torch.int64), softcap, scale, f)[0].amax(-1, keepdim=True)


def row_sums(z: Tensor, targets: Tensor, maxima: Tensor, softcap: float, scale: float, *, f: Any = PYTORCH) -> Tensor:
    """[rows, 3] of y = x − maximum: Σ exp(y) over the classes but the target, the target's y, Σ y.

    The target's is 0 if it is elsewhere.  All are relative to the maximum, so that an offset of all logits costs no
    digits.
    """
    x, _, is_target = _capped(z, targets, softcap, scale, f)
    y = x - maxima
    others = f.row_sum(torch.where(is_target, 0.0, f.exp(y)))
    return torch.stack((others, torch.where(is_target, y, 0.0).sum(-1), f.row_sum(y)), -1)


def row_losses(
    maxima: Tensor, sums: Tensor, smoothing: float, z_loss: float, classes: int, *, f: Any = PYTORCH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, row_max, log_sum, 1 − p of the target), each [rows], from sums over all classes.

    The log-sum-exp is row_max + log_sum.  They stay apart: their sum would lose digits of log_sum to a large row_max,
    and with it every probability.
    """
    row_max, others, target_y, sum_y = maxima[:, 0], *sums.unbind(-1)
    row_sum = others + f.exp(target_y)
    log_sum = f.log(row_sum)
    # With p near 1, log1p of the others keeps what log(Σ) − y would round away.
    likelihood = torch.where(target_y == 0, f.log1p(others), log_sum - target_y)
    loss = (1 - smoothing) * likelihood
    if smoothing:
        loss = loss + smoothing * (log_sum - sum_y / classes)
    if z_loss:
        loss = loss + z_loss * (row_max + log_sum).square()
    return loss, row_max, log_sum, others / row_sum


def loss_pass(
    z: Tensor, targets: Tensor, softcap: float, scale: float, smoothing: float, z_loss: float, *, f: Any = PYTORCH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``row_losses`` of rows that hold all classes; those of ignored rows are not used."""
    maxima = row_max(z, softcap, scale, f=f)
    sums = row_sums(z, targets, maxima, softcap, scale, f=f)
    return row_losses(maxima, sums, smoothing, z_loss, z.shape[1], f=f)


def gradient_pass(
    z: Tensor,
    targets: Tensor,
    rows: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    missing: Tensor,
    lse_rows: Tensor | None,
    softcap: float,
    scale: float,
    terms: tuple[float, float, int],
    *,
    f: Any = PYTORCH,
) -> None:
    """z is overwritten by the gradient of Σ (rows·loss + lse_rows·lse) with respect to the logits before the scale.

    ``lse_rows`` None is 0 for every row; ``terms`` are the label smoothing, the factor of the z-loss, and V.

    It is apart from ``loss_pass`` and has no reduction, so that no second tensor of the chunk's size is held: fused
    with the sums, it would store the exponentials of a low-precision chunk in float32, at twice the chunk's bytes.
    """
    smoothing, z_loss, classes = terms
    x, t, is_target = _capped(z, targets, softcap, scale, f)
    p = f.exp(x - row_max[:, None] - log_sum[:, None])
    # d = p − (1 − s)·onehot − s/V, where p − 1 of the target is −missing: no cancellation when p is near 1.
    d = torch.where(is_target, smoothing - missing[:, None], p)
    if smoothing:
        d = d - smoothing / classes
    if z_loss:
        d = d + 2 * z_loss * (row_max + log_sum)[:, None] * p
    unused = rows[:, None] == 0  # such a row may hold NaN
    if lse_rows is None:
        d = d * (rows[:, None] * scale)
    else:
        d = (d * rows[:, None] + p * lse_rows[:, None]) * scale
        unused = unused & (lse_rows[:, None] == 0)
    if softcap:
        d = d * (1 - t * t)
    z.copy_(torch.where(unused, 0.0, d))
