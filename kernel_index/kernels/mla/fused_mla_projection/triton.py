"""The RMS norm between the two products: one launch forward; backward one launch and one small sum in a fixed order.

A tile of whole rows is in registers.  Backward reads latent once for three results: normed for the gradient of w_up,
the gradient of latent, and the weight's share of each program.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors
from kernel_index.core.triton.sums import dependent, sum_parts

TILE = 2048
"""Elements of a tile; a longer row is a tile of its own."""

WAVES = 4
"""Programs of the backward pass for each processor."""

MOST_PARTS = 512
"""Of them, and rows of the partial sums."""

STAGES = 3
"""Tiles in flight in a program of the backward pass."""


def pick_config(width: int) -> dict:
    """Rows of about ``TILE`` elements together, 16 elements for each thread."""
    block = next_power_of_2(width)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512))}


@jit
def _weight(weight_ptr, o_d, width, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    w = tl.full((1, BLOCK), 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + o_d, mask=o_d < width, other=0.0).to(tl.float32)
    return w  # [1, BLOCK]


@jit
def _normalise_kernel(
    latent_ptr, weight_ptr, normed_ptr, rstd_ptr, rows, width, eps,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    o_d = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    m_x = (o_n < rows) & (o_d < width)
    x = tl.load(latent_ptr + o_n * width + o_d, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)  # [ROWS, 1]
    tl.store(rstd_ptr + o_n, rstd, mask=o_n < rows)
    normed = x * rstd * _weight(weight_ptr, o_d, width, HAS_WEIGHT, BLOCK)
    tl.store(normed_ptr + o_n * width + o_d, normed.to(normed_ptr.dtype.element_ty), mask=m_x)


@jit
def _gradients_kernel(
    d_normed_ptr, latent_ptr, rstd_ptr, weight_ptr, normed_ptr, d_latent_ptr, parts_ptr, rows, width, tiles_per_program,
    HAS_WEIGHT: tl.constexpr, NORMED: tl.constexpr, D_LATENT: tl.constexpr, D_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program takes a run of tiles and sums its part of the weight's gradient in registers."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the sum's programs, which wait
    program = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    w = _weight(weight_ptr, o_d, width, HAS_WEIGHT, BLOCK)
    first = program * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tl.cdiv(rows, ROWS).to(tl.int64))
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        o_n = tile * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
        o_x = o_n * width + o_d  # [ROWS, BLOCK]
        m_x = (o_n < rows) & (o_d < width)
        rstd = tl.load(rstd_ptr + o_n, mask=o_n < rows, other=0.0)  # [ROWS, 1]
        x_hat = tl.load(latent_ptr + o_x, mask=m_x, other=0.0).to(tl.float32) * rstd  # [ROWS, BLOCK]
        if NORMED:
            tl.store(normed_ptr + o_x, (x_hat * w).to(normed_ptr.dtype.element_ty), mask=m_x)
        if D_LATENT or D_WEIGHT:
            dy = tl.load(d_normed_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
            if D_LATENT:
                dx_hat = dy * w
                mean = tl.sum(dx_hat * x_hat, 1, keep_dims=True) / width  # [ROWS, 1]
                d_latent = rstd * (dx_hat - x_hat * mean)
                tl.store(d_latent_ptr + o_x, d_latent.to(d_latent_ptr.dtype.element_ty), mask=m_x)
            if D_WEIGHT:
                weight_sum += dy * x_hat
    if D_WEIGHT:
        d_weight = tl.sum(weight_sum, 0, keep_dims=True)  # [1, BLOCK]
        tl.store(parts_ptr + program * width + o_d, d_weight, mask=o_d < width)


def normalise(latent: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Contiguous ``[N, L]`` in; normed of latent's dtype and 1/rms in float32 out."""
    rows, width = latent.shape
    normed, rstd = torch.empty_like(latent), latent.new_empty((rows,), dtype=torch.float32)
    if rows and width:
        config = pick_config(width)
        weight = None if weight is None else weight.contiguous()
        with on_device(latent):
            _normalise_kernel[(ceil_div(rows, config["ROWS"]),)](
                latent, weight, normed, rstd, rows, width, eps, HAS_WEIGHT=weight is not None, **config
            )
    return normed, rstd


def gradients(
    d_normed: Tensor | None, latent: Tensor, rstd: Tensor, weight: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """normed once more, the gradient of latent, the gradient of weight in its dtype; None where not wanted."""
    rows, width = latent.shape
    normed, d_latent = (torch.empty_like(latent) if want else None for want in wanted[:2])
    if not any(wanted) or rows == 0 or width == 0:
        return normed, d_latent, torch.zeros_like(weight) if wanted[2] and weight is not None else None
    config = pick_config(width)
    tiles = ceil_div(rows, config["ROWS"])
    programs = min(tiles, WAVES * processors(latent), MOST_PARTS)
    parts = latent.new_empty((programs, width), dtype=torch.float32) if wanted[2] else None
    weight = None if weight is None else weight.contiguous()
    with on_device(latent):
        _gradients_kernel[(programs,)](
            d_normed, latent, rstd, weight, normed, d_latent, parts, rows, width, ceil_div(tiles, programs),
            HAS_WEIGHT=weight is not None, NORMED=wanted[0], D_LATENT=wanted[1], D_WEIGHT=wanted[2], STAGES=STAGES,
            DEPENDENT=parts is not None and dependent(latent), **config,
        )  # fmt: skip
    d_weight = None if parts is None or weight is None else sum_parts(parts, torch.empty_like(weight))
    return normed, d_latent, d_weight
