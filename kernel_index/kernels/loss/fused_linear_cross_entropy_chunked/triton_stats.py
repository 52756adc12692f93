"""Statistics of whole rows of logits without truncation, and the gradient of any columns of them.

A row is read once.  A lane keeps its largest logit, and of its others, relative to it, the sum of exponentials e^y,
that sum without the target, and Σ y·e^y: when a larger logit comes, all three move on.  So the largest class is in no
sum that a logarithm is taken of.  The formulas are ``stats_pass``'s.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, on_device
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.slices import Layout
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.triton_rows import (
    capped,
    geometry_of,
    log1p,
    row_of_slice,
    whole_blocks,
)


@jit
def _moved_on(sum_ey, total, shift, factor):
    """Σ y·e^y where every y falls by −shift ≥ 0 and ``factor`` is its exponential; 0 where there was nothing."""
    return tl.where(factor > 0, (sum_ey + total * shift) * factor, 0.0)


@jit
def _statistics_kernel(
    z_ptr, targets_ptr, log_prob_ptr, entropy_ptr, max_ptr, log_sum_ptr, missing_ptr, predicted_ptr, class_stride,
    width, slice_width, vocab, softcap, temperature, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    lane_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    lane_class = columns
    others = tl.zeros((BLOCK,), tl.float32)
    but_target = tl.zeros((BLOCK,), tl.float32)
    sum_ey = tl.zeros((BLOCK,), tl.float32)
    lane_target = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        o_v = start + columns  # [BLOCK]
        p_row = row_of_slice(z_ptr, start, row, class_stride, width, slice_width)
        x, _ = capped(p_row, o_v, o_v < vocab, softcap, 1.0, CAP)  # [BLOCK]
        is_target = o_v == target
        is_larger = (x > lane_max) | ((x != x) & (lane_max == lane_max))  # the first NaN is the largest
        new_max = tl.where(is_larger, x, lane_max)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # −inf − (−inf) would be NaN
        shift = tl.where(lane_max == float("-inf"), 0.0, (lane_max - base) / temperature)
        factor = tl.where(lane_max == float("-inf"), 0.0, tl.exp(shift))
        y = (x - base) / temperature
        e = tl.exp(y)
        ey = tl.where(e > 0, e * y, 0.0)
        sum_ey = _moved_on(sum_ey, others + 1.0, shift, factor) + ey
        others = others * factor + tl.where(is_larger, factor, e)
        but_target = but_target * factor + tl.where(is_target, 0.0, e)
        lane_target += tl.where(is_target, x, 0.0)
        lane_class = tl.where(is_larger, o_v, lane_class)
        lane_max = new_max
    some_nan = tl.max((lane_max != lane_max).to(tl.int32), 0) == 1
    row_max = tl.where(some_nan, float("nan"), tl.max(lane_max, 0))
    is_best = tl.where(some_nan, lane_max != lane_max, lane_max == row_max)
    predicted = tl.min(tl.where(is_best, lane_class, vocab), 0)
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    shift = tl.where(lane_max == float("-inf"), 0.0, (lane_max - base) / temperature)
    factor = tl.where(lane_max == float("-inf"), 0.0, tl.exp(shift))
    of_best = tl.where(is_best & (lane_class == predicted), 0.0, factor)
    row_others = tl.sum(others * factor + of_best, 0)
    row_sum = 1.0 + row_others
    log_sum = log1p(row_others)
    entropy = log_sum - tl.sum(_moved_on(sum_ey, others + 1.0, shift, factor), 0) / row_sum
    target_y = (tl.sum(lane_target, 0) - row_max) / temperature
    tl.store(log_prob_ptr + row, target_y - log_sum)
    tl.store(entropy_ptr + row, entropy)
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(missing_ptr + row, tl.sum(but_target * factor, 0) / row_sum)
    tl.store(predicted_ptr + row, predicted.to(tl.int64))


@jit
def _gradient_kernel(
    z_ptr, out_ptr, targets_ptr, of_log_prob_ptr, of_entropy_ptr, entropy_ptr, max_ptr, log_sum_ptr, missing_ptr,
    stride, out_stride, first, width, classes, softcap, temperature, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < width
    of_log_prob, of_entropy = tl.load(of_log_prob_ptr + row), tl.load(of_entropy_ptr + row)
    x, t = capped(z_ptr + row * stride, o_v, m_v, softcap, 1.0, CAP)  # [BLOCK]
    log_p = (x - tl.load(max_ptr + row)) / temperature - tl.load(log_sum_ptr + row)
    p = tl.exp(log_p)
    d = of_log_prob * tl.where(o_v + first == tl.load(targets_ptr + row), tl.load(missing_ptr + row), -p)
    d -= of_entropy * tl.where(p > 0, p * (log_p + tl.load(entropy_ptr + row)), 0.0)
    if CAP:
        d *= 1.0 - t * t
    used = tl.where(of_log_prob == 0.0, of_entropy, 1.0) != 0.0  # another row may hold NaN, and so may padding
    d = tl.where(used, tl.where(o_v + first < classes, d / temperature, 0.0), 0.0)
    tl.store(out_ptr + row * out_stride + o_v, d.to(out_ptr.dtype.element_ty), mask=m_v)


def statistics(
    z: Tensor,
    targets: Tensor,
    outputs: tuple[Tensor, ...],
    vocab: int,
    softcap: float,
    temperature: float,
    layout: Layout,
) -> None:
    """Fill log_prob, entropy, row_max, log_sum, 1 − p of the target, and predicted of each row."""
    if targets.shape[0]:
        geometry = geometry_of(whole_blocks(layout, vocab))
        with on_device(z):
            _statistics_kernel[(targets.shape[0],)](
                z, targets.contiguous(), *outputs, layout.class_stride, layout.width, layout.slice_width, vocab,
                softcap, temperature, CAP=softcap != 0.0, **geometry,
            )  # fmt: skip


def gradient(
    z: Tensor,
    targets: Tensor,
    upstream: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
    first: int,
    classes: int,
    softcap: float,
    temperature: float,
    out: Tensor,
) -> None:
    """``out`` gets the gradient of the columns of logits that begin with class ``first``; it may be z.

    ``upstream`` are those of log_prob and entropy; ``statistics`` are entropy, row_max, log_sum and 1 − p.
    """
    if z.numel():
        geometry = geometry_of(z.shape[1])
        with on_device(z):
            _gradient_kernel[(z.shape[0], ceil_div(z.shape[1], geometry["BLOCK"]))](
                z, out, targets.contiguous(), *(t.contiguous() for t in (*upstream, *statistics)), z.stride(0),
                out.stride(0), first, z.shape[1], classes, softcap, temperature, CAP=softcap != 0.0, **geometry,
            )  # fmt: skip
