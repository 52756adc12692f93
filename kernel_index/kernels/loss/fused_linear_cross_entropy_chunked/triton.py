"""Loss and log-sum-exp of whole rows of logits, and the gradient of any columns of them, in place.

The first reads a row once, maximum and sum of exponentials online.  The formulas are ``chunk_pass``'s.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device

BLOCK = 2048
"""Columns of a step."""


@triton.jit
def _capped(z_ptr, at, mask, softcap, scale, CAP: tl.constexpr):
    """Capped logits and tanh of the step; −inf and 0 beyond the row."""
    x = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    t = x
    if CAP:
        # tanh by exp of a negative argument: no overflow, and exact at ±1
        e = tl.exp(-2.0 * tl.abs(x / softcap))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(x < 0, -t, t)
        x = softcap * t
    return tl.where(mask, x, float("-inf")), t


@triton.jit
def _losses_kernel(
    z_ptr, targets_ptr, losses_ptr, lse_ptr, missing_ptr, stride, vocab, softcap, scale, smoothing, z_loss,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    # Per lane: the maximum so far, Σ exp(x − maximum) over the other classes, and Σ x for smoothing.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    total_x = tl.zeros((BLOCK,), tl.float32)
    own = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + columns
        mask = at < vocab
        x, _ = _capped(z_ptr, at, mask, softcap, scale, CAP)
        is_target = at == target
        new_top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − (−inf) would be NaN
        others = others * tl.exp(top - base) + tl.where(is_target, 0.0, tl.exp(x - base))
        own += tl.where(is_target, x, 0.0)
        if SMOOTH:
            total_x += tl.where(mask, x, 0.0)
        top = new_top
    row_top = tl.max(top, 0)
    lanes_base = tl.where(top == float("-inf"), 0.0, top)
    row_others = tl.sum(others * tl.exp(lanes_base - row_top), 0)
    row_own = tl.sum(own, 0) - row_top
    row_total = row_others + tl.exp(row_own)
    lse = row_top + tl.log(row_total)
    # With p of the target near 1, log(1 + others) keeps what log(Σ) − x would round away.
    small = row_others * (1.0 - row_others * (0.5 - row_others * (1.0 / 3.0)))
    near_one = tl.where(row_others < 1e-2, small, tl.log(1.0 + row_others))
    likelihood = tl.where(row_own == 0.0, near_one, tl.log(row_total) - row_own)
    loss = (1.0 - smoothing) * likelihood
    if SMOOTH:
        loss += smoothing * (lse - tl.sum(total_x, 0) / vocab)
    if Z_LOSS:
        loss += z_loss * lse * lse
    tl.store(losses_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(missing_ptr + row, row_others / row_total)  # 1 − p of the target, without cancellation


@triton.jit
def _gradient_kernel(
    z_ptr, targets_ptr, rows_ptr, lse_ptr, missing_ptr, stride, first, width, classes, softcap, scale, smoothing,
    z_loss, CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    factor, lse, missing = tl.load(rows_ptr + row), tl.load(lse_ptr + row), tl.load(missing_ptr + row)
    x, t = _capped(z_ptr, at, mask, softcap, scale, CAP)
    p = tl.exp(x - lse)
    d = tl.where(at + first == tl.load(targets_ptr + row), smoothing - missing, p)
    if SMOOTH:
        d -= smoothing / classes
    if Z_LOSS:
        d += 2.0 * z_loss * lse * p
    if CAP:
        d *= 1.0 - t * t
    d = tl.where(factor == 0.0, 0.0, d * (factor * scale))  # an ignored row may hold NaN
    tl.store(z_ptr + at, d.to(z_ptr.dtype.element_ty), mask=mask)


Constants = tuple[float, float, float, float]
"""Softcap (0 is none), scale, smoothing, z-loss."""


def _flags(constants: Constants) -> dict[str, bool]:
    return {"CAP": constants[0] != 0.0, "SMOOTH": constants[2] != 0.0, "Z_LOSS": constants[3] != 0.0}


def _geometry(columns: int) -> dict[str, int]:
    block = min(BLOCK, next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 128))}


def losses(z: Tensor, targets: Tensor, outputs: tuple[Tensor, Tensor, Tensor], constants: Constants) -> None:
    """Fill loss, log-sum-exp and 1 − p of the target of each row."""
    if z.shape[0]:
        with on_device(z):
            _losses_kernel[(z.shape[0],)](
                z, targets.contiguous(), *outputs, z.stride(0), z.shape[1], *constants,
                **_flags(constants), **_geometry(z.shape[1]),
            )  # fmt: skip


def gradient(
    z: Tensor,
    targets: Tensor,
    rows: Tensor,
    lse: Tensor,
    missing: Tensor,
    first: int,
    classes: int,
    constants: Constants,
) -> None:
    """Turn the columns of logits that begin with class ``first`` into the gradient of Σ rows · loss."""
    if z.numel():
        how = _geometry(z.shape[1])
        with on_device(z):
            _gradient_kernel[(z.shape[0], ceil_div(z.shape[1], how["BLOCK"]))](
                z, targets.contiguous(), rows.contiguous(), lse, missing, z.stride(0), first, z.shape[1], classes,
                *constants, **_flags(constants), **how,
            )  # fmt: skip
