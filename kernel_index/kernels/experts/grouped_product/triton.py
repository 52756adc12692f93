"""The product whose rows do not depend on each other, for groups of rows: see ``core/triton/products.py``.

A tile holds rows of one group.  No group's size is read on the host: there are as many programs as any sizes need, and
a program finds its tile by the ends of the groups.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import narrow
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2, on_device
from kernel_index.core.triton.products import DECODING, FEW, FLOAT32, SQUARE, Tiles


def _tiles(rows: int, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32 or interpreting():
        return FLOAT32
    return DECODING if rows <= FEW else SQUARE


@jit
def _rows_of(program, ends_ptr, E, BM: tl.constexpr, BE: tl.constexpr):
    """The group of a program's tile, the tile's first row and the group's last; no rows where there is none."""
    o_e = tl.arange(0, BE)  # [BE]
    ends = tl.load(ends_ptr + o_e, mask=o_e < E, other=0)
    starts = tl.load(ends_ptr + o_e - 1, mask=(o_e > 0) & (o_e < E), other=0)
    tiles = (ends - starts + (BM - 1)) // BM
    e = tl.sum(((tl.cumsum(tiles, 0) <= program) & (o_e < E)).to(tl.int32), 0)
    before = tl.sum(tl.where(o_e < e, tiles, 0), 0)
    first = tl.sum(tl.where(o_e == e, starts, 0), 0) + (program - before) * BM
    return e, first, tl.sum(tl.where(o_e == e, ends, 0), 0)


@jit
def _grouped_kernel(
    a_ptr, b_ptr, ends_ptr, y_ptr, E, N, K, b_e, b_k, b_n,
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y [S, N] = a [S, K] · b [K, N] of each row's group.  ``WHOLE``: K is a multiple of BK.

    The tiles of a row of them follow each other: the rows of a are read once, and those of b are in the L2 cache.
    """
    columns = tl.cdiv(N, BN)
    e, first, end = _rows_of(tl.program_id(0) // columns, ends_ptr, E, BM, BE)
    if first < end:
        first_m, first_n = tl.cast(first, tl.int64), tl.cast(tl.program_id(0) % columns, tl.int64) * BN
        o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
        m_m, m_n = first_m + o_m < end, first_n + o_n < N
        p_a = a_ptr + first_m * K + (o_m[:, None] * K + o_k[None, :])  # [BM, BK]
        p_b = b_ptr + e.to(tl.int64) * b_e + first_n * b_n + (o_k[:, None] * b_k + o_n[None, :] * b_n)  # [BK, BN]
        acc = tl.zeros((BM, BN), tl.float32)
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
            p_a += BK
            p_b += BK * b_k
        p_y = y_ptr + first_m * N + first_n + (o_m[:, None] * N + o_n[None, :])
        tl.store(p_y, narrow(acc, y_ptr.dtype.element_ty, UPCAST), mask=m_m[:, None] & m_n[None, :])


@jit
def _weights_kernel(
    g_ptr, x_ptr, ends_ptr, y_ptr, M, N,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y [E, M, N] = gᵀ·x over the rows of each group, in their order; g is [S, M] and x [S, N]."""
    e = tl.program_id(2)
    start, end = tl.load(ends_ptr + e - 1, mask=e > 0, other=0), tl.load(ends_ptr + e)
    first_m, first_n = tl.cast(tl.program_id(0), tl.int64) * BM, tl.cast(tl.program_id(1), tl.int64) * BN
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    m_m, m_n = first_m + o_m < M, first_n + o_n < N
    p_g = g_ptr + start.to(tl.int64) * M + first_m + (o_m[:, None] + o_k[None, :] * M)  # [BM, BK]
    p_x = x_ptr + start.to(tl.int64) * N + first_n + (o_k[:, None] * N + o_n[None, :])  # [BK, BN]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, end - start, BK):
        m_k = k + o_k < end - start
        b_g = tl.load(p_g, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_k[:, None] & m_n[None, :], other=0.0)
        if UPCAST:
            b_g, b_x = b_g.to(tl.float32), b_x.to(tl.float32)
        acc = tl.dot(b_g, b_x, acc, input_precision="ieee")
        p_g += BK * M
        p_x += BK * N
    p_y = y_ptr + e.to(tl.int64) * M * N + first_m * N + first_n + (o_m[:, None] * N + o_n[None, :])
    tl.store(p_y, narrow(acc, y_ptr.dtype.element_ty, UPCAST), mask=m_m[:, None] & m_n[None, :])


def _blocks(tiles: Tiles) -> dict[str, int | bool]:
    blocks = {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "UPCAST": interpreting()}
    return blocks | {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def multiply(a: Tensor, b: Tensor, ends: Tensor, y: Tensor) -> Tensor:
    """``y`` [S, N] = a [S, K] · b[e] [K, N] for the rows of group e; a is dense."""
    (rows, K), (groups, _, N) = a.shape, b.shape
    if y.numel():
        tiles = _tiles(rows, a.dtype)
        with on_device(a):
            _grouped_kernel[((ceil_div(rows, tiles.rows) + groups) * ceil_div(N, tiles.columns),)](
                a, b, ends, y, groups, N, K, *b.stride(),
                WHOLE=K % tiles.depth == 0, BE=next_power_of_2(groups), **_blocks(tiles),
            )  # fmt: skip
    return y


def multiply_weights(g: Tensor, x: Tensor, ends: Tensor, y: Tensor) -> Tensor:
    """``y`` [E, M, N] = gᵀ·x over each group's rows; both are dense."""
    groups, M, N = y.shape
    if y.numel():
        tiles = _tiles(FEW + 1, g.dtype)
        with on_device(g):
            _weights_kernel[(ceil_div(M, tiles.rows), ceil_div(N, tiles.columns), groups)](
                g, x, ends, y, M, N, **_blocks(tiles)
            )  # fmt: skip
    return y
