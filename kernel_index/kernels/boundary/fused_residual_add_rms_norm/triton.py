"""One launch forward; backward one launch over the rows and one small reduction in a fixed order.

A row of up to ``WHOLE`` elements stays in registers, on NVIDIA's GPUs one of two bytes up to ``WHOLE_LOW``.  A program
loops over the blocks of a wider one; its second read comes from the L2 cache, since it works on one row at a time.
Few wide rows go another way back (``triton_few_rows``).
Names are those of ``core/triton/attention.py``: ``o_d`` and ``m_d`` are the columns of a block and which of them exist,
``o_r`` [ROWS, 1] the rows.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors
from kernel_index.core.triton.row import load_row, store_row
from kernel_index.core.triton.sums import MOST_PARTS, sum_parts
from kernel_index.kernels.boundary.fused_residual_add_rms_norm import triton_few_rows
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.triton_few_rows import norm_grad

WHOLE = 8192
"""Elements of the widest row that is held in registers."""

WHOLE_LOW = 16384
"""The same for elements of two bytes."""

STEP = 4096
"""Elements of a step of the backward pass: as many rows as hold them.  One narrow row would not fill a processor."""

STAGES = 3
"""Steps in flight in the backward pass: on an H200, 79 µs for 8192 × 4096 in bfloat16 against 112 with two."""

AT_ONCE, LATE = 4, 2048
"""Rows for each processor up to which the forward pass loads the weight before it sums a row; of rows wider than LATE
it always does.

Of many narrow rows the weight's registers, 40 for 32 a thread, would keep one program in four waiting: on an H200 2048
rows of 2048 took 10.6 µs for 11.1; but of 5120 24.9 for 24.6.
"""

NARROW = 1024
"""Elements of a row up to which a whole step has half the warps, and one more is in flight."""

PAIRED = 32
"""Rows for each processor from which on wider steps have half the warps, too, and two programs there.

One computes while the other waits: 8192 × 2048 took 39.3 µs for 45.6 on an H200, 32768 × 2048 140.5 for 153.5.
"""


def is_whole(width: int, *tensors: Tensor | None) -> bool:
    """Whether a row of these tensors is held in registers."""
    low = all(t.element_size() <= 2 for t in tensors if t is not None)
    return width <= WHOLE or (width <= WHOLE_LOW and low and torch.version.hip is None)


def pick_config(width: int, whole: bool) -> dict[str, int]:
    """Block and warps of the forward pass for a row of ``width`` elements: 16 for each thread."""
    block = next_power_of_2(width) if whole else WHOLE
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def rows_for_each(rows: int, processors: int) -> int:
    """Rows for each processor, which decide how a row is summed; as if there were many where that may not be."""
    return PAIRED if is_invariant() else ceil_div(rows, processors)


def are_paired(width: int, rows: int) -> bool:
    return NARROW < next_power_of_2(width) <= STEP and rows >= PAIRED


def pick_backward_config(width: int, rows: int, whole: bool) -> dict[str, int]:
    """Rows and columns of a step, 8 to 16 elements for each thread; no more rows than there are for each processor."""
    block = next_power_of_2(width) if whole else WHOLE
    held = max(1, min(STEP // block, next_power_of_2(rows)))
    narrow = block <= NARROW and held * block == STEP
    warps = min(16, max(1, held * block // (512 if narrow or are_paired(width, rows) else 256)))
    stages = 1 if block > WHOLE else STAGES + 1 if narrow else STAGES  # one: a row of 16384 takes the memory of three
    return {"ROWS": held, "BLOCK": block, "STAGES": stages, "num_warps": warps}


@jit
def _scaled(d, scale_ptr, o_d, m_d, SCALE: tl.constexpr):
    """SCALE: 0 none, 1 one number, 2 one for each channel."""
    if SCALE == 1:
        d = d * tl.load(scale_ptr).to(tl.float32)
    if SCALE == 2:
        d = d * load_row(scale_ptr, o_d, m_d)
    return d


@jit
def _forward_kernel(
    residual_ptr, delta_ptr, weight_ptr, scale_ptr, new_ptr, normed_ptr, rstd_ptr, width, eps, offset,
    SCALE: tl.constexpr, ONE_BLOCK: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """EARLY: the weight is on its way while the row is summed."""
    row = tl.program_id(0).to(tl.int64)
    base = row * width
    squares = tl.zeros((BLOCK,), tl.float32)
    x = squares  # [BLOCK]: a row of one block is kept between the loops
    w = squares
    for start in range(0, BLOCK if ONE_BLOCK else width, BLOCK):
        o_d = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_d = o_d < width
        d = _scaled(load_row(delta_ptr + base, o_d, m_d), scale_ptr, o_d, m_d, SCALE)
        stored = (load_row(residual_ptr + base, o_d, m_d) + d).to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + base + o_d, stored, mask=m_d)
        x = stored.to(tl.float32)  # the norm is taken of the stream as stored
        if EARLY:
            w = load_row(weight_ptr, o_d, m_d)
        squares += tl.where(m_d, x * x, 0.0)
    rstd = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, BLOCK if ONE_BLOCK else width, BLOCK):
        o_d = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_d = o_d < width
        if not ONE_BLOCK:
            x = load_row(new_ptr + base, o_d, m_d)  # [BLOCK]
        if not EARLY:
            w = load_row(weight_ptr, o_d, m_d)
        store_row(normed_ptr + base, o_d, x * rstd * (w + offset), m_d)


@jit
def _backward_kernel(
    d_new_ptr, d_normed_ptr, new_ptr, rstd_ptr, weight_ptr, scale_ptr, delta_ptr,
    d_residual_ptr, d_delta_ptr, weight_parts_ptr, scale_parts_ptr, rows, width, offset, steps_per_program,
    HAS_NEW: tl.constexpr, HAS_NORMED: tl.constexpr, SCALE: tl.constexpr, RESIDUAL: tl.constexpr, DELTA: tl.constexpr,
    WEIGHT: tl.constexpr, D_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes a run of steps of ROWS rows, and sums its partial of the weight's gradient in registers."""
    program = tl.program_id(0).to(tl.int64)
    first = program * steps_per_program
    last = tl.minimum(first + steps_per_program, tl.cdiv(rows, ROWS))
    o_d = tl.arange(0, BLOCK)[None, :]
    m_d = o_d < width
    w = tl.zeros((1, BLOCK), tl.float32)
    if HAS_NORMED:
        w = load_row(weight_ptr, o_d, m_d) + offset
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    scale_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(0, last - first, num_stages=STAGES):
        o_r = (first + step) * ROWS + tl.arange(0, ROWS)[:, None]  # 64 bits, [ROWS, 1]
        m = (o_r < rows) & m_d
        o_rd = o_r * width + o_d
        dx = tl.zeros((ROWS, BLOCK), tl.float32)
        if HAS_NEW:
            dx = load_row(d_new_ptr, o_rd, m)  # [ROWS, BLOCK]
        if HAS_NORMED:
            x = load_row(new_ptr, o_rd, m)  # [ROWS, BLOCK]
            dy = load_row(d_normed_ptr, o_rd, m)  # [ROWS, BLOCK]
            rstd = tl.load(rstd_ptr + o_r, mask=o_r < rows, other=0.0)  # [ROWS, 1]
            x_hat = x * rstd
            mean = tl.sum(dy * w * x_hat, 1)[:, None] / width  # beyond the row dy is 0
            dx += norm_grad(x, dy, w, rstd, mean)
            if WEIGHT:
                weight_sum += dy * x_hat
        if RESIDUAL:
            store_row(d_residual_ptr, o_rd, dx, m)
        if D_SCALE:
            scale_sum += dx * load_row(delta_ptr, o_rd, m)
        if DELTA:
            store_row(d_delta_ptr, o_rd, _scaled(dx, scale_ptr, o_d, m_d, SCALE), m)
    o_d, m_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK) < width
    if WEIGHT:
        tl.store(weight_parts_ptr + program * width + o_d, tl.sum(weight_sum, 0), mask=m_d)
    if D_SCALE:
        if SCALE == 1:
            tl.store(scale_parts_ptr + program, tl.sum(tl.sum(scale_sum, 1), 0))
        else:
            tl.store(scale_parts_ptr + program * width + o_d, tl.sum(scale_sum, 0), mask=m_d)


@jit
def _add_to_partial(p_partial, o_d, value, is_first, m_d):
    """Adds to this program's row of the partial sums, which no other program touches; begins it with the first row."""
    b_part = tl.load(p_partial + o_d, mask=m_d & (is_first == 0), other=0.0)
    tl.store(p_partial + o_d, b_part + value, mask=m_d)


@jit
def _backward_wide_kernel(
    d_new_ptr, d_normed_ptr, new_ptr, rstd_ptr, weight_ptr, scale_ptr, delta_ptr,
    d_residual_ptr, d_delta_ptr, weight_parts_ptr, scale_parts_ptr, rows, width, offset, rows_per_program,
    HAS_NEW: tl.constexpr, HAS_NORMED: tl.constexpr, SCALE: tl.constexpr, RESIDUAL: tl.constexpr, DELTA: tl.constexpr,
    WEIGHT: tl.constexpr, D_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for rows that do not fit, one at a time: two loops over a row's blocks, partial sums in memory."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, last - first):
        row = first + step
        base = row * width
        is_first = (row == first).to(tl.int32)
        rstd = 0.0
        mean = 0.0
        if HAS_NORMED:
            rstd = tl.load(rstd_ptr + row)
            products = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, width, BLOCK):
                o_d = start + tl.arange(0, BLOCK)  # [BLOCK]
                m_d = o_d < width
                dx_hat = load_row(d_normed_ptr + base, o_d, m_d) * (load_row(weight_ptr, o_d, m_d) + offset)
                products += dx_hat * load_row(new_ptr + base, o_d, m_d) * rstd
            mean = tl.sum(products, 0) / width
        for start in range(0, width, BLOCK):
            o_d = start + tl.arange(0, BLOCK)  # [BLOCK]
            m_d = o_d < width
            dx = tl.zeros((BLOCK,), tl.float32)
            if HAS_NEW:
                dx = load_row(d_new_ptr + base, o_d, m_d)  # [BLOCK]
            if HAS_NORMED:
                x = load_row(new_ptr + base, o_d, m_d)  # [BLOCK]
                dy = load_row(d_normed_ptr + base, o_d, m_d)  # [BLOCK]
                dx += norm_grad(x, dy, load_row(weight_ptr, o_d, m_d) + offset, rstd, mean)
                if WEIGHT:
                    _add_to_partial(weight_parts_ptr + program * width, o_d, dy * x * rstd, is_first, m_d)
            if RESIDUAL:
                store_row(d_residual_ptr + base, o_d, dx, m_d)
            if D_SCALE:
                products = dx * load_row(delta_ptr + base, o_d, m_d)
                if SCALE == 1:
                    scale_sum += products
                else:
                    _add_to_partial(scale_parts_ptr + program * width, o_d, products, is_first, m_d)
            if DELTA:
                store_row(d_delta_ptr + base, o_d, _scaled(dx, scale_ptr, o_d, m_d, SCALE), m_d)
    if D_SCALE and SCALE == 1:
        tl.store(scale_parts_ptr + program, tl.sum(scale_sum, 0))


def _kind_of_scale(scale: Tensor | None) -> int:
    return 0 if scale is None else 1 if scale.numel() == 1 else 2


def forward(
    residual: Tensor, delta: Tensor, weight: Tensor, scale: Tensor | None, eps: float, offset: float, outputs: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous ``[rows, width]`` in, ``outputs`` = (new_residual, normed, rstd) filled."""
    rows, width = residual.shape
    if rows and width:
        with on_device(residual):
            whole = is_whole(width, residual, delta, *outputs[:2])
            config = pick_config(width, whole)
            early = whole and (width > LATE or rows <= AT_ONCE * processors(residual))
            _forward_kernel[(rows,)](
                residual, delta, weight, scale, *outputs, width, eps, offset,
                SCALE=_kind_of_scale(scale), ONE_BLOCK=whole, EARLY=early, **config,
            )  # fmt: skip
    return outputs


def backward(
    d_new: Tensor | None,
    d_normed: Tensor | None,
    new_residual: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    delta: Tensor | None,
    offset: float,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``outputs`` = (d_residual, d_delta, d_weight, d_scale), None where not wanted; sums are taken in float32."""
    rows, width = new_residual.shape
    d_residual, d_delta, d_weight, d_scale = outputs
    if rows == 0 or width == 0:
        for d_parameter in (d_weight, d_scale):
            if d_parameter is not None:
                d_parameter.zero_()
        return outputs
    if triton_few_rows.takes(rows, width, scale, d_normed, d_weight):
        few: tuple = (d_new, d_normed, new_residual, rstd, weight, offset, (d_residual, d_delta, d_weight))
        triton_few_rows.backward(*few)
        return outputs
    most = processors(new_residual)
    whole = is_whole(width, d_new, d_normed, new_residual, delta)
    each = rows_for_each(rows, most)
    config = pick_backward_config(width, each, whole)
    most = min(MOST_PARTS, 2 * most) if are_paired(width, each) else most  # programs, and rows of the partial sums
    kernel, held = (_backward_kernel, config["ROWS"]) if whole else (_backward_wide_kernel, 1)
    steps = ceil_div(rows, held)
    count = min(steps, most)
    parts = [
        None if o is None else new_residual.new_empty((count, o.numel()), dtype=torch.float32) for o in outputs[2:]
    ]
    with on_device(new_residual):
        kernel[(count,)](
            d_new, d_normed, new_residual, rstd, weight, scale, delta, d_residual, d_delta, *parts,
            rows, width, offset, ceil_div(steps, count),
            HAS_NEW=d_new is not None, HAS_NORMED=d_normed is not None, SCALE=_kind_of_scale(scale),
            RESIDUAL=d_residual is not None, DELTA=d_delta is not None,
            WEIGHT=d_weight is not None, D_SCALE=d_scale is not None, **config,
        )  # fmt: skip
    for d_parameter, part in zip((d_weight, d_scale), parts, strict=True):
        if d_parameter is not None and part is not None:
            sum_parts(part, d_parameter.view(part.shape[1]))
    return outputs
