"""What the kernels over rows of logits share: a block of capped logits, where a row's slices are, and the geometry."""

import triton.language as tl

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.slices import Layout

BLOCK = 2048
"""Columns that a program reads at once."""


@jit
def capped(p_row, o_v, m_v, softcap, scale, CAP: tl.constexpr):
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
def row_of_slice(z_ptr, start, row, class_stride, width, slice_width):
    """Where class 0 of a row would be, were its slice with class ``start`` the whole row: slices hold whole blocks."""
    first = start // slice_width * slice_width
    p_row = z_ptr + tl.cast(first, tl.int64) * class_stride + row * tl.minimum(slice_width, width - first)
    return p_row - first


@jit
def log1p(x):
    """Of x ≥ 0; a series where log(1 + x) would lose digits."""
    small = x * (1.0 - x * (0.5 - x * (1.0 / 3.0)))
    return tl.where(x < 1e-2, small, tl.log(1.0 + x))


def power_in(number: int) -> int:
    """The largest power of two that divides it."""
    return number & -number


def block_of(columns: int) -> int:
    """Columns that a program reads at once; a slice of more than one is made of whole blocks."""
    return min(BLOCK, next_power_of_2(columns))


def geometry_of(columns: int) -> dict[str, int]:
    block = block_of(columns)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 128))}


def whole_blocks(layout: Layout, vocab: int) -> int:
    """The columns by which a kernel's block is chosen: each lies in one slice."""
    return vocab if layout.slice_width >= layout.width else power_in(layout.slice_width)
