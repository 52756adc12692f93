"""Lists of tiles by two small launches: what a plan of PyTorch operations takes dozens for."""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, row_stride
from kernel_index.masks.doc_window_mask.intervals import RowBounds

CHUNK = 128
"""Tiles that a program looks at together."""


@jit
def _ranges_kernel(
    start_ptr, end_ptr, q_end_ptr, of_queries_ptr, of_keys_ptr, window_b, q_end_b, T, S, n, m, most,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IN_TREE: tl.constexpr,
):  # fmt: skip
    """``Ranges`` of one tile of queries, int32 [4], or of one tile of keys, int32 [2]."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tile < n:
        o_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
        o_q = tile * BM + o_m
        m_m = o_m < BM
        m_q = m_m & (o_q < T)
        start = tl.load(start_ptr + row * window_b + o_q, mask=m_q, other=0)  # [BLOCK_M]
        end = tl.load(end_ptr + row * window_b + o_q, mask=m_q, other=0)  # [BLOCK_M]
        m_some = start < end
        start = tl.where(m_some, start, most * BN)
        end = tl.where(m_some, end, 0)
        p_out = of_queries_ptr + (row * n + tile) * 4
        tl.store(p_out, tl.minimum(tl.min(start, 0) // BN, most))
        tl.store(p_out + 1, tl.minimum((tl.max(end, 0) + (BN - 1)) // BN, most))
        tl.store(p_out + 2, tl.minimum((tl.max(tl.where(m_m, start, 0), 0) + (BN - 1)) // BN, most))
        tl.store(p_out + 3, tl.minimum(tl.min(tl.where(m_m, end, most * BN), 0) // BN, most))
    elif IN_TREE:
        o_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        o_k = (tile - n) * BN + o_n
        m_n = o_n < BN
        q_end = tl.load(q_end_ptr + row * q_end_b + o_k, mask=m_n & (o_k < S), other=0)  # [BLOCK_N]
        p_out = of_keys_ptr + (row * m + tile - n) * 2
        tl.store(p_out, tl.minimum((tl.max(q_end, 0) + (BM - 1)) // BM, most))
        tl.store(p_out + 1, tl.minimum(tl.min(tl.where(m_n, q_end, most * BM), 0) // BM, most))


@jit
def _lists_kernel(
    of_queries_ptr, of_keys_ptr, counts_ptr, indices_ptr, n, m, of_kind,
    BY_KEY: tl.constexpr, IN_TREE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The lists of one tile, of partly allowed tiles and, ``of_kind`` tiles later, of full ones."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles, others = n, m
    if BY_KEY:
        tiles, others = m, n
    at = row * tiles + tile
    partial_count, full_count = 0, 0
    for first in range(0, others, CHUNK):
        o_other = first + tl.arange(0, CHUNK)  # [CHUNK]
        m_other = o_other < others
        i, j = tile + tl.zeros((CHUNK,), tl.int32), o_other
        if BY_KEY:
            i, j = o_other, tile + tl.zeros((CHUNK,), tl.int32)
        p_query = of_queries_ptr + (row * n + i) * 4
        m_seen = (j >= tl.load(p_query, mask=m_other, other=0)) & (j < tl.load(p_query + 1, mask=m_other, other=0))
        m_full = (j >= tl.load(p_query + 2, mask=m_other, other=0)) & (j < tl.load(p_query + 3, mask=m_other, other=0))
        if IN_TREE:
            p_key = of_keys_ptr + (row * m + j) * 2
            m_seen = m_seen & (tl.load(p_key, mask=m_other, other=0) > i)
            m_full = m_full & (tl.load(p_key + 1, mask=m_other, other=0) > i)
        partial = (m_seen & ~m_full & m_other).to(tl.int32)  # [CHUNK]
        full = (m_full & m_other).to(tl.int32)  # [CHUNK]
        p_partial = indices_ptr + at * others + partial_count + tl.cumsum(partial, 0) - 1
        p_full = indices_ptr + (of_kind + at) * others + full_count + tl.cumsum(full, 0) - 1
        tl.store(p_partial, o_other, mask=partial > 0)
        tl.store(p_full, o_other, mask=full > 0)
        partial_count += tl.sum(partial, 0)
        full_count += tl.sum(full, 0)
    tl.store(counts_ptr + at, partial_count)
    tl.store(counts_ptr + of_kind + at, full_count)


def lists(bounds: RowBounds, keys: int, tile: tuple[int, int], *, by_key: bool) -> tuple[Tensor, Tensor]:
    """int32 counts [2, rows, n] and indices [2, rows, n, m], of partly allowed tiles and of full ones."""
    start, end, q_end = bounds
    (rows, queries), (q_block, kv_block) = start.shape, tile
    n, m = ceil_div(queries, q_block), ceil_div(keys, kv_block)
    of_queries = start.new_empty(rows, n, 4)
    of_keys = start.new_empty(rows, m, 2)
    tiles, others = (m, n) if by_key else (n, m)
    counts = start.new_empty(2, rows, tiles)
    indices = start.new_zeros(2, rows, tiles, others)
    in_tree = q_end is not None
    if counts.numel() and others:
        with on_device(start):
            _ranges_kernel[(n + m if in_tree else n, rows)](
                start, end, q_end, of_queries, of_keys, row_stride(start), row_stride(q_end) if in_tree else 0,
                queries, keys, n, m, max(n, m), q_block, kv_block, next_power_of_2(q_block),
                next_power_of_2(kv_block), in_tree, num_warps=1,
            )  # fmt: skip
            _lists_kernel[(tiles, rows)](
                of_queries, of_keys, counts, indices, n, m, rows * tiles, by_key, in_tree, CHUNK, num_warps=1
            )
    return counts if others else torch.zeros_like(counts), indices
