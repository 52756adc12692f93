"""A counting sort of tokens by their experts, and the two moves of rows that it describes: each element once.

The sort is stable and has no atomics: tiles count their experts, one program for each expert adds up its tiles' counts,
and each tile then knows where its rows begin.  Names are those of ``core/triton/attention.py``: ``o_s`` [TILE] are
pairs of a token and one of its experts, ``o_e`` [EXPERTS] experts, ``o_d`` [BLOCK] channels.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device
from kernel_index.core.triton.row import load_row, store_row

TILE_ELEMENTS = 4096
"""Pairs × experts that a program of the sort holds at once."""

WIDEST = 2048
"""Channels of a row that a program moves at once."""

SCANNED = 1024
"""Tiles whose counts are added up at once."""


@jit
def _matches(experts_ptr, pairs, count, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    """1 where the pair's expert is the column's, int32 [TILE, EXPERTS]."""
    o_s = tl.program_id(0) * TILE + tl.arange(0, TILE)
    expert = tl.load(experts_ptr + o_s, mask=o_s < pairs, other=count).to(tl.int32)
    o_e = tl.arange(0, EXPERTS)
    return ((expert[:, None] == o_e[None, :]) & (o_e < count)[None, :]).to(tl.int32)


@jit
def _count_kernel(experts_ptr, counts_ptr, pairs, count, tiles, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    """``counts`` [count, tiles]: the pairs of each tile for each expert."""
    of_tile = tl.sum(_matches(experts_ptr, pairs, count, TILE, EXPERTS), 0)
    o_e = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + o_e.to(tl.int64) * tiles + tl.program_id(0), of_tile, mask=o_e < count)


@jit
def _scan_kernel(counts_ptr, totals_ptr, tiles, SCANNED: tl.constexpr):
    """An expert's counts become those of all tiles before; its total goes to ``totals``."""
    p_counts = counts_ptr + tl.program_id(0).to(tl.int64) * tiles
    total = tl.zeros((), tl.int32)
    for first in range(0, tiles, SCANNED):
        o_t = first + tl.arange(0, SCANNED)
        found = tl.load(p_counts + o_t, mask=o_t < tiles, other=0)
        tl.store(p_counts + o_t, total + tl.cumsum(found, 0) - found, mask=o_t < tiles)
        total += tl.sum(found, 0)
    tl.store(totals_ptr + tl.program_id(0), total)


@jit
def _place_kernel(
    experts_ptr, counts_ptr, totals_ptr, slots_ptr, offsets_ptr, pairs, count, tiles,
    TILE: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    o_e = tl.arange(0, EXPERTS)
    totals = tl.load(totals_ptr + o_e, mask=o_e < count, other=0)
    ends = tl.cumsum(totals, 0)
    before = tl.load(counts_ptr + o_e.to(tl.int64) * tiles + tl.program_id(0), mask=o_e < count, other=0)
    matches = _matches(experts_ptr, pairs, count, TILE, EXPERTS)
    own = tl.cumsum(matches, 0) - 1 + (ends - totals + before)[None, :]  # the slot of a pair in its expert's column
    o_s = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(slots_ptr + o_s, tl.sum(own * matches, 1), mask=o_s < pairs)
    tl.store(offsets_ptr + o_e, ends, mask=(o_e < count) & (tl.program_id(0) == 0))


@jit
def _dispatch_kernel(x_ptr, slots_ptr, rows_ptr, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < width
    b_x = tl.load(x_ptr + token * width + o_d, mask=m_d)
    for k in range(K):
        slot = tl.load(slots_ptr + token * K + k).to(tl.int64)
        tl.store(rows_ptr + slot * width + o_d, b_x, mask=m_d)


@jit
def _combine_kernel(
    rows_ptr, weights_ptr, slots_ptr, base_ptr, out_ptr, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        slot = tl.load(slots_ptr + token * K + k).to(tl.int64)
        row = load_row(rows_ptr + slot * width, o_d, m_d)
        if WEIGHTED:
            row = row * tl.load(weights_ptr + token * K + k).to(tl.float32)
        total += row
    if BASE:
        total += load_row(base_ptr + token * width, o_d, m_d)
    store_row(out_ptr + token * width, o_d, total, m_d)


@jit
def _combine_backward_kernel(
    g_ptr, rows_ptr, weights_ptr, slots_ptr, d_rows_ptr, d_weights_ptr, width, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for k in range(K):
        slot = tl.load(slots_ptr + token * K + k).to(tl.int64)
        weight = tl.load(weights_ptr + token * K + k).to(tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            o_d = start + tl.arange(0, BLOCK)
            m_d = o_d < width
            g = load_row(g_ptr + token * width, o_d, m_d)
            products += g * load_row(rows_ptr + slot * width, o_d, m_d)
            store_row(d_rows_ptr + slot * width, o_d, g * weight, m_d)
        d_weight = tl.sum(products, 0)
        tl.store(d_weights_ptr + token * K + k, d_weight.to(d_weights_ptr.dtype.element_ty))


def _tile(count: int) -> dict[str, int]:
    experts = next_power_of_2(max(2, count))
    return {"TILE": max(16, min(1024, TILE_ELEMENTS // experts)), "EXPERTS": experts}


def _moves(width: int) -> dict[str, int]:
    block = min(WIDEST, next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def plan(experts: Tensor, slots: Tensor, offsets: Tensor) -> None:
    """Contiguous experts [N, k] in; int32 ``slots`` [N, k] and ``offsets`` [E] filled."""
    pairs, count = experts.numel(), offsets.shape[0]
    if not pairs:
        offsets.zero_()
        return
    config = _tile(count)
    tiles = ceil_div(pairs, config["TILE"])
    counts = experts.new_empty((count, tiles), dtype=torch.int32)
    totals = experts.new_empty((count,), dtype=torch.int32)
    with on_device(experts):
        _count_kernel[(tiles,)](experts, counts, pairs, count, tiles, **config, num_warps=4)
        _scan_kernel[(count,)](counts, totals, tiles, SCANNED=min(SCANNED, next_power_of_2(tiles)), num_warps=4)
        _place_kernel[(tiles,)](
            experts, counts, totals, slots, offsets, pairs, count, tiles, **config, num_warps=4
        )  # fmt: skip


def dispatch(x: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Contiguous x [N, C] and slots [N, k] in; ``rows`` [N·k, C] filled."""
    if rows.numel():
        config = _moves(x.shape[1])
        with on_device(x):
            _dispatch_kernel[(x.shape[0], ceil_div(x.shape[1], config["BLOCK"]))](
                x, slots, rows, x.shape[1], K=slots.shape[1], **config
            )  # fmt: skip


def combine(rows: Tensor, weights: Tensor | None, slots: Tensor, base: Tensor | None, out: Tensor) -> None:
    """Contiguous rows [N·k, C], weights and slots [N, k] and base [N, C] in; ``out`` [N, C] filled."""
    if out.numel():
        config = _moves(out.shape[1])
        with on_device(out):
            _combine_kernel[(out.shape[0], ceil_div(out.shape[1], config["BLOCK"]))](
                rows, weights, slots, base, out, out.shape[1],
                K=slots.shape[1], WEIGHTED=weights is not None, BASE=base is not None, **config,
            )  # fmt: skip


def combine_backward(
    g: Tensor, rows: Tensor, weights: Tensor, slots: Tensor, d_rows: Tensor, d_weights: Tensor
) -> None:
    """Contiguous tensors in; the gradients of rows and weights filled, each row's from its own token alone."""
    if slots.numel():
        width = g.shape[1]
        with on_device(g):
            _combine_backward_kernel[(slots.shape[0],)](
                g, rows, weights, slots, d_rows, d_weights, width, K=slots.shape[1], **_moves(width)
            )  # fmt: skip
