"""Loss and softmax statistics of whole rows of logits, and the gradient of any columns of them, in place.

The first reads a row once, maximum and sum of exponentials online.  The formulas are ``chunk_pass``'s.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.slices import Layout
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.triton_rows import (
    block_of,
    capped,
    log1p,
    power_in,
    row_of_slice,
    whole_blocks,
)

BLOCKS = 4
"""Blocks of a row that a program of the losses reads at once."""

STAGES = 1
"""Of them in flight."""

GRADIENT_BLOCK, LEAST_GRADIENT_BLOCK = 4096, 1024
"""Columns of a program of the gradient: as many as divide those of a slice, in these bounds."""


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _losses_kernel(
    z_ptr, targets_ptr, losses_ptr, max_ptr, log_sum_ptr, missing_ptr, class_stride, width, slice_width, vocab,
    softcap, scale, smoothing, z_loss,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Logits of ``width`` classes lie in slices of ``slice_width``; those before a class take ``class_stride`` each.

    BLOCKS blocks are read at once, each of which lies in one slice: a lane's sum is scaled anew once for all of them.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    steps = BLOCK * tl.arange(0, BLOCKS)[:, None]  # [BLOCKS, 1]
    # Per lane: the maximum so far, Σ exp(x − maximum) over the other classes, Σ (x − maximum) for smoothing, the
    # target's logit.
    lane_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    lane_others = tl.zeros((BLOCK,), tl.float32)
    lane_y = tl.zeros((BLOCK,), tl.float32)
    lane_target = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab, BLOCKS * BLOCK, num_stages=STAGES):
        o_v = start + steps + columns[None, :]  # [BLOCKS, BLOCK]
        m_v = o_v < vocab
        p_row = row_of_slice(z_ptr, start + steps, row, class_stride, width, slice_width)  # [BLOCKS, 1]
        x, _ = capped(p_row, o_v, m_v, softcap, scale, CAP)  # [BLOCKS, BLOCK]
        is_target = o_v == target
        new_max = _larger(lane_max, tl.reduce(x, 0, _larger))  # [BLOCK]
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # −inf − (−inf) would be NaN
        others = tl.sum(tl.where(is_target, 0.0, tl.exp(x - shift[None, :])), 0)
        lane_others = lane_others * tl.exp(lane_max - shift) + others
        lane_target += tl.sum(tl.where(is_target, x, 0.0), 0)
        if SMOOTH:
            # The terms before are relative to the maximum before; where that was −∞ their sum is −∞ already.
            before = tl.where(lane_max == float("-inf"), 0.0, lane_max - shift)
            lane_y += tl.where(start + columns < vocab, (start // BLOCK) * before, 0.0)
            lane_y += tl.sum(tl.where(m_v, x - shift[None, :], 0.0), 0)
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    # A lane without a class has the maximum −∞ and the factor 0, however small row_max is.
    row_others = tl.sum(lane_others * tl.exp(lane_max - tl.where(row_max == float("-inf"), 0.0, row_max)), 0)
    target_logit = tl.sum(lane_target, 0) - row_max
    row_sum = row_others + tl.exp(target_logit)
    log_sum = tl.log(row_sum)
    # With p of the target near 1, log1p of the others keeps what log(Σ) − x would round away.
    near_one = log1p(row_others)
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
    z_ptr, out_ptr, targets_ptr, rows_ptr, max_ptr, log_sum_ptr, missing_ptr, lse_rows_ptr, stride, out_stride, first,
    width, classes, softcap, scale, smoothing, z_loss,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    out_ptr += row * out_stride
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < width
    factor, missing = tl.load(rows_ptr + row), tl.load(missing_ptr + row)
    row_max, log_sum = tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    x, t = capped(z_ptr, o_v, m_v, softcap, scale, CAP)  # [BLOCK]
    p = tl.exp(x - row_max - log_sum)
    dz = tl.where(o_v + first == tl.load(targets_ptr + row), smoothing - missing, p)
    if SMOOTH:
        dz -= smoothing / classes
    if Z_LOSS:
        dz += 2.0 * z_loss * (row_max + log_sum) * p
    unused = factor == 0.0  # such a row may hold NaN, and so may padding
    dz *= factor
    if LSE:
        lse_factor = tl.load(lse_rows_ptr + row)
        dz += lse_factor * p
        unused = unused & (lse_factor == 0.0)
    if CAP:
        dz *= 1.0 - t * t
    dz = tl.where(unused, 0.0, tl.where(o_v + first < classes, dz * scale, 0.0))
    tl.store(out_ptr + o_v, dz.to(out_ptr.dtype.element_ty), mask=m_v)


def losses_geometry(columns: int, vocab: int) -> dict[str, int]:
    """Two vectors of 16 bytes of a block for each thread, and four blocks at once: 1.25 exponentials a logit, not 2."""
    block = block_of(columns)
    blocks = min(BLOCKS, next_power_of_2(ceil_div(vocab, block)))
    return {"BLOCK": block, "BLOCKS": blocks, "STAGES": STAGES, "num_warps": max(1, min(8, block // 256))}


def gradient_geometry(columns: int) -> dict[str, int]:
    """16 columns for each thread: a program of fewer ends before its five numbers of the row are worth their wait."""
    whole = max(LEAST_GRADIENT_BLOCK, power_in(columns))
    block = min(GRADIENT_BLOCK, next_power_of_2(columns), whole if columns % whole == 0 else GRADIENT_BLOCK)
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


Constants = tuple[float, float, float, float]
"""Softcap (0 is none), scale, smoothing, z-loss."""


def _flags(constants: Constants) -> dict[str, bool]:
    return {"CAP": constants[0] != 0.0, "SMOOTH": constants[2] != 0.0, "Z_LOSS": constants[3] != 0.0}


def losses(
    z: Tensor,
    targets: Tensor,
    outputs: tuple[Tensor, ...],
    vocab: int,
    constants: Constants,
    layout: Layout,
) -> None:
    """Fill loss, row_max, log_sum and 1 − p of the target of each row: the log-sum-exp is row_max + log_sum.

    The first ``vocab`` columns of z, which is dense, are classes.
    """
    if targets.shape[0]:
        geometry = losses_geometry(whole_blocks(layout, vocab), vocab)
        with on_device(z):
            _losses_kernel[(targets.shape[0],)](
                z, targets.contiguous(), *outputs, layout.class_stride, layout.width, layout.slice_width, vocab,
                *constants, **_flags(constants), **geometry,
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
    out: Tensor | None = None,
) -> None:
    """Turn the columns of logits that begin with class ``first`` into the gradient of Σ (rows·loss + lse_rows·lse).

    ``statistics`` are row_max, log_sum and 1 − p of ``losses``; ``lse_rows`` None is 0 for every row.  It replaces the
    logits, or is written to ``out``; it is 0 for columns from class ``classes`` on.
    """
    if z.numel():
        geometry, out = gradient_geometry(z.shape[1]), z if out is None else out
        with on_device(z):
            _gradient_kernel[(z.shape[0], ceil_div(z.shape[1], geometry["BLOCK"]))](
                z, out, targets.contiguous(), rows.contiguous(), *statistics,
                rows if lse_rows is None else lse_rows.contiguous(), z.stride(0), out.stride(0), first, z.shape[1],
                classes,
                *constants, **_flags(constants), LSE=lse_rows is not None, **geometry,
            )  # fmt: skip
