"""Loss and softmax statistics of whole rows of logits, and the gradient of any columns of them, in place.

The first reads a row once, maximum and sum of exponentials online.  The formulas are ``chunk_pass``'s.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device

BLOCK = 2048
"""Columns that a program reads at once."""


@jit
def _capped(p_row, o_v, m_v, softcap, scale, CAP: tl.constexpr):
    """Capped logits and their tanh [BLOCK]; −inf and 0 beyond the row."""
    x = tl.load(p_row + o_v, mask=m_v, other=0.0).to(tl.float32) * scale
    t = x
    if CAP:
        # tanh by exp of a negative argument: no overflow, and exact at ±1
        e = tl.exp(-2.0 * tl.abs(x / softcap))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(x < 0, -t, t)
        x = softcap * t
    return tl.where(m_v, x, float("-inf")), t


@jit
def _losses_kernel(
    z_ptr, targets_ptr, losses_ptr, max_ptr, log_sum_ptr, missing_ptr, stride, vocab, softcap, scale, smoothing, z_loss,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    # Per lane: the maximum so far, Σ exp(x − maximum) over the other classes, Σ (x − maximum) for smoothing, the
    # target's logit.
    lane_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    lane_others = tl.zeros((BLOCK,), tl.float32)
    lane_y = tl.zeros((BLOCK,), tl.float32)
    lane_target = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        o_v = start + columns  # [BLOCK]
        m_v = o_v < vocab
        x, _ = _capped(z_ptr, o_v, m_v, softcap, scale, CAP)  # [BLOCK]
        is_target = o_v == target
        new_max = tl.maximum(lane_max, x, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # −inf − (−inf) would be NaN
        lane_others = lane_others * tl.exp(lane_max - shift) + tl.where(is_target, 0.0, tl.exp(x - shift))
        lane_target += tl.where(is_target, x, 0.0)
        if SMOOTH:
            # The terms before are relative to the maximum before; where that was −∞ their sum is −∞ already.
            before = tl.where(lane_max == float("-inf"), 0.0, lane_max - shift)
            lane_y += tl.where(m_v, (start // BLOCK) * before + (x - shift), 0.0)
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    # A lane without a class has the maximum −∞ and the factor 0, however small row_max is.
    row_others = tl.sum(lane_others * tl.exp(lane_max - tl.where(row_max == float("-inf"), 0.0, row_max)), 0)
    target_logit = tl.sum(lane_target, 0) - row_max
    row_sum = row_others + tl.exp(target_logit)
    log_sum = tl.log(row_sum)
    # With p of the target near 1, log(1 + others) keeps what log(Σ) − x would round away.
    small = row_others * (1.0 - row_others * (0.5 - row_others * (1.0 / 3.0)))
    near_one = tl.where(row_others < 1e-2, small, tl.log(1.0 + row_others))
    likelihood = tl.where(target_logit == 0.0, near_one, log_sum - target_logit)
    loss = (1.0 - smoothing) * likelihood
    if SMOOTH:
        count = (vocab - columns + (BLOCK - 1)) // BLOCK  # classes of each lane
        below = tl.where(lane_max == float("-inf"), 0.0, lane_max) - row_max
        sum_y = tl.sum(tl.where(count > 0, lane_y + count * below, 0.0), 0)
        loss += smoothing * (log_sum - sum_y / vocab)
    if Z_LOSS:
        loss += z_loss * (row_max + log_sum) * (row_max + log_sum)
    tl.store(losses_ptr + row, loss)
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(missing_ptr + row, row_others / row_sum)  # 1 − p of the target, without cancellation


@jit
def _gradient_kernel(
    z_ptr, targets_ptr, rows_ptr, max_ptr, log_sum_ptr, missing_ptr, lse_rows_ptr, stride, first, width, classes,
    softcap, scale, smoothing, z_loss,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < width
    factor, missing = tl.load(rows_ptr + row), tl.load(missing_ptr + row)
    row_max, log_sum = tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    x, t = _capped(z_ptr, o_v, m_v, softcap, scale, CAP)  # [BLOCK]
    p = tl.exp(x - row_max - log_sum)
    dz = tl.where(o_v + first == tl.load(targets_ptr + row), smoothing - missing, p)
    if SMOOTH:
        dz -= smoothing / classes
    if Z_LOSS:
        dz += 2.0 * z_loss * (row_max + log_sum) * p
    unused = factor == 0.0  # such a row may hold NaN
    dz *= factor
    if LSE:
        lse_factor = tl.load(lse_rows_ptr + row)
        dz += lse_factor * p
        unused = unused & (lse_factor == 0.0)
    if CAP:
        dz *= 1.0 - t * t
    dz = tl.where(unused, 0.0, dz * scale)
    tl.store(z_ptr + o_v, dz.to(z_ptr.dtype.element_ty), mask=m_v)


Constants = tuple[float, float, float, float]
"""Softcap (0 is none), scale, smoothing, z-loss."""


def _flags(constants: Constants) -> dict[str, bool]:
    return {"CAP": constants[0] != 0.0, "SMOOTH": constants[2] != 0.0, "Z_LOSS": constants[3] != 0.0}


def _geometry(columns: int) -> dict[str, int]:
    block = min(BLOCK, next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 128))}


def losses(z: Tensor, targets: Tensor, outputs: tuple[Tensor, ...], constants: Constants) -> None:
    """Fill loss, row_max, log_sum and 1 − p of the target of each row: the log-sum-exp is row_max + log_sum."""
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
    statistics: tuple[Tensor, Tensor, Tensor],
    first: int,
    classes: int,
    constants: Constants,
    lse_rows: Tensor | None = None,
) -> None:
    """Turn the columns of logits that begin with class ``first`` into the gradient of Σ (rows·loss + lse_rows·lse).

    ``statistics`` are row_max, log_sum and 1 − p of ``losses``; ``lse_rows`` None is 0 for every row.
    """
    if z.numel():
        geometry = _geometry(z.shape[1])
        with on_device(z):
            _gradient_kernel[(z.shape[0], ceil_div(z.shape[1], geometry["BLOCK"]))](
                z, targets.contiguous(), rows.contiguous(), *statistics,
                rows if lse_rows is None else lse_rows.contiguous(), z.stride(0), first, z.shape[1], classes,
                *constants, **_flags(constants), LSE=lse_rows is not None, **geometry,
            )  # fmt: skip
