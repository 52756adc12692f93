"""Products whose rows do not depend on the other rows, on a GPU: the kernel behind ``core/device_products.py``.

An element of the result is one accumulator of the tensor cores over the summed dimension in rising order.  The shape of
a tile has no part in that: tiles have 64 rows at least, for which Hopper has one instruction, so a decoding step of one
row and a batch of thousands compute a row by the same sums.  float32 is multiplied by FMA, in steps of one size.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import target_of, triton_version
from kernel_index.core.triton.attention import narrow
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, interpreting, on_device


class Tiles(NamedTuple):
    """Rows, columns and summed elements of a tile, and how it is run."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


FEW = 64
"""Rows of a decoding step at most: a narrow tile then, so that many programs read the weight at once."""

FLOAT32 = Tiles(64, 64, 32, 8, 2)
DECODING = Tiles(64, 32, 128, 4, 4)
SQUARE = Tiles(128, 128, 64, 8, 4)
LARGE = Tiles(128, 256, 64, 8, 3)
MANY_TILES = 96
"""Large tiles from which on they fill a GPU."""


def tiles_of(rows: int, columns: int, dtype: torch.dtype, add: bool = False) -> Tiles:
    if dtype == torch.float32 or interpreting():
        return FLOAT32
    if rows <= FEW:
        return DECODING
    large = ceil_div(rows, LARGE.rows) * ceil_div(columns, LARGE.columns) >= MANY_TILES
    return LARGE if large and not add else SQUARE  # which has the registers for an accumulator that is loaded


GROUP = 8
"""Row tiles whose programs run side by side: what they read of the right operand is then in the L2 cache."""


@jit
def _tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP rows of tiles, column by column."""
    in_group = GROUP * column_tiles
    first = program // in_group * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + program % in_group % rows, program % in_group // rows


@jit
def _product_kernel(
    a_ptr, b_ptr, bias_ptr, y_ptr, M, N, K, a_m, a_k, b_k, b_n,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y [M, N] = a [M, K] · b [K, N] + bias [N], or y += with ``ADD``.  ``WHOLE``: K is a multiple of BK."""
    row, column = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    first_m, first_n = tl.cast(row, tl.int64) * BM, tl.cast(column, tl.int64) * BN
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    m_m, m_n = first_m + o_m < M, first_n + o_n < N
    p_a = a_ptr + first_m * a_m + (o_m[:, None] * a_m + o_k[None, :] * a_k)  # [BM, BK]
    p_b = b_ptr + first_n * b_n + (o_k[:, None] * b_k + o_n[None, :] * b_n)  # [BK, BN]
    p_y = y_ptr + first_m * N + first_n + (o_m[:, None] * N + o_n[None, :])  # [BM, BN]
    acc = tl.zeros((BM, BN), tl.float32)
    if ADD:
        acc = tl.load(p_y, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    for k in range(0, K, BK):
        if WHOLE:
            b_a = tl.load(p_a, mask=m_m[:, None], other=0.0)
            b_b = tl.load(p_b, mask=m_n[None, :], other=0.0)
        else:
            m_k = k + o_k < K
            b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        if UPCAST:
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        acc = tl.dot(b_a, b_b, acc, input_precision="ieee")
        p_a += BK * a_k
        p_b += BK * b_k
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_n + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y, narrow(acc, y_ptr.dtype.element_ty, UPCAST), mask=m_m[:, None] & m_n[None, :])


def is_hopper(x: Tensor) -> bool:
    return target_of(x.device).arch == 90 and triton_version() >= (3, 6)


def multiply(
    a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor, tiles: Tiles | None = None, *, add: bool = False,
    in_parts: bool = False,
) -> Tensor:  # fmt: skip
    """``y`` [M, N], contiguous, becomes a [M, K] · b [K, N] + bias [N], of any strides.

    With ``add`` the product is added to y, which is float32: the accumulator goes on from there.  ``in_parts``: the sum
    may be made in parts, whose number the sizes decide.
    """
    (M, K), N = a.shape, b.shape[1]
    if y.numel() == 0:
        return y
    if tiles is None and (in_parts or M > FEW) and is_hopper(a):
        from kernel_index.core.triton import hopper_products

        if hopper_products.multiplied(a, b, bias, y, few=M <= FEW, add=add, in_parts=in_parts):
            return y
    tiles = tiles or tiles_of(M, N, a.dtype, add)
    with on_device(a):
        _product_kernel[(ceil_div(M, tiles.rows) * ceil_div(N, tiles.columns),)](
            a, b, bias, y, M, N, K, *a.stride(), *b.stride(), HAS_BIAS=bias is not None, ADD=add,
            WHOLE=K % tiles.depth == 0, BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, GROUP=GROUP,
            UPCAST=interpreting(), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return y
