"""The unions of the tokens that neighbouring queries selected, as lists in ascending order.

A table has one 64-bit word for each tile of 64 queries and each token: its bits are the queries that selected it.  Bits
are set by atomics, whose order has no influence on the result; the words that are not 0 become the list.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device

TILE = 64
"""Queries of a tile: bits of a word."""

MARKED = 8, 256
"""Queries of a program that sets bits, a divisor of ``TILE``, and entries of each; a warp has 128 of them."""


@jit
def _tokens_of(p_indices, t, m_n, i_t, QUERIES, S):
    """Of query t, at the places of ``m_n`` [BN]: −1 for what is no token."""
    b_token = tl.load(p_indices + t * i_t, mask=m_n & (t < QUERIES), other=-1)  # [BN]
    return tl.where((b_token >= 0) & (b_token < S), b_token, -1).to(tl.int32)


@jit
def _mark_kernel(
    indices_ptr, table_ptr, i_b, i_t, i_p, FIRST, QUERIES, TILES, P, N, S, WIDTH,
    BQ: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Set the bits of BQ queries in the words of the tokens that they have at BN places.

    Those that have the token of the first of them in the same place set their bits with it, by one atomic.  Programs of
    one tile run side by side: then the L2 holds their words.
    """
    steps = tl.cdiv(N, BN)
    first = (tl.program_id(0) // steps).to(tl.int64) * BQ
    b, p = (tl.program_id(1) // P).to(tl.int64), (tl.program_id(1) % P).to(tl.int64)
    o_n = tl.program_id(0) % steps * BN + tl.arange(0, BN)  # [BN]
    p_indices = indices_ptr + b * i_b + tl.cast(FIRST, tl.int64) * i_t + p * i_p + o_n
    p_table = table_ptr + (tl.program_id(1).to(tl.int64) * TILES + first // TILE) * WIDTH
    bit = tl.full((), 1, tl.int64) << first % TILE
    lead = _tokens_of(p_indices, first, o_n < N, i_t, QUERIES, S)  # [BN]
    bits = tl.zeros((BN,), tl.int64) + bit
    for i in range(1, BQ):
        b_token = _tokens_of(p_indices, first + i, o_n < N, i_t, QUERIES, S)  # [BN]
        bits += tl.where(b_token == lead, bit << i, 0)
        m_other = (b_token >= 0) & (b_token != lead)
        tl.atomic_or(p_table + b_token, tl.zeros((BN,), tl.int64) + (bit << i), mask=m_other, sem="relaxed")
    tl.atomic_or(p_table + lead, bits, mask=lead >= 0, sem="relaxed")


@jit
def _count_kernel(table_ptr, counts_ptr, present_ptr, TOTAL, ROWS: tl.constexpr, GRAIN: tl.constexpr):
    """How many words of each run of GRAIN are not 0, and which: a bit for each of them."""
    o_run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_run = o_run < TOTAL
    o_word = o_run[:, None] * GRAIN + tl.arange(0, GRAIN)[None, :]  # [ROWS, GRAIN]
    m_word = (tl.load(table_ptr + o_word, mask=m_run[:, None], other=0) != 0).to(tl.int32)
    tl.store(counts_ptr + o_run, tl.sum(m_word, 1), mask=m_run)
    tl.store(present_ptr + o_run, tl.sum(m_word << tl.arange(0, GRAIN)[None, :], 1), mask=m_run)


@jit
def _before_kernel(counts_ptr, before_ptr, sizes_ptr, RUNS, BN: tl.constexpr):
    """Entries before each run of a list, and behind the last one, from those of each run."""
    o_list = tl.program_id(0).to(tl.int64)
    p_before = before_ptr + o_list * (RUNS + 1)
    total = tl.zeros((), tl.int32)
    for first in range(0, RUNS, BN):
        o_run = first + tl.arange(0, BN)
        b_count = tl.load(counts_ptr + o_list * RUNS + o_run, mask=o_run < RUNS, other=0)
        tl.store(p_before + o_run, total + tl.cumsum(b_count, 0) - b_count, mask=o_run < RUNS)
        total += tl.sum(b_count, 0)
    tl.store(p_before + RUNS, total)
    tl.store(sizes_ptr + o_list, total)


@jit
def bits_below(b_present, o_bit):
    """How many bits of ``b_present`` are set below bit ``o_bit`` < 32; int32 of one shape."""
    x = b_present & ~(tl.zeros_like(o_bit) - 1 << o_bit)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@jit
def _list_kernel(
    table_ptr, begin_ptr, before_ptr, present_ptr, tokens_ptr, words_ptr, RUNS, ROWS: tl.constexpr, GRAIN: tl.constexpr
):
    """Write the words of ROWS runs of GRAIN tokens that are not 0, and their tokens, to the list of the tile.

    Only these are read: where neighbours share their tokens they are few.
    """
    tile = tl.program_id(1).to(tl.int64)
    o_run = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_run = o_run < RUNS
    o_bit = tl.broadcast_to(tl.arange(0, GRAIN)[None, :], (ROWS, GRAIN))
    o_token = o_run[:, None] * GRAIN + o_bit  # [ROWS, GRAIN]
    b_present = tl.load(present_ptr + tile * RUNS + o_run, mask=m_run, other=0)
    before = tl.load(before_ptr + tile * (RUNS + 1) + o_run, mask=m_run, other=0)  # [ROWS]
    m_word = ((b_present[:, None] >> o_bit) & 1) != 0  # [ROWS, GRAIN]
    b_word = tl.load(table_ptr + tile * RUNS * GRAIN + o_token, mask=m_word, other=0)
    rank = bits_below(tl.broadcast_to(b_present[:, None], (ROWS, GRAIN)), o_bit)
    o_entry = tl.load(begin_ptr + tile) + (before[:, None] + rank).to(tl.int64)
    tl.store(tokens_ptr + o_entry, o_token, mask=m_word)
    tl.store(words_ptr + o_entry, b_word, mask=m_word)


def mark(table: Tensor, indices: Tensor, first: int, queries: int, keys: int) -> None:
    """Fill a table [B · P · tiles, width] of zeros for ``queries`` queries from ``first`` on."""
    (batch, _, shared, count), (together, step) = indices.shape, MARKED
    with on_device(indices):
        _mark_kernel[(ceil_div(queries, together) * ceil_div(count, step), batch * shared)](
            indices, table, *indices.stride()[:3], first, queries, ceil_div(queries, TILE), shared, count, keys,
            table.shape[1], BQ=together, BN=step, TILE=TILE, num_warps=step // 128,
        )  # fmt: skip


def count(table: Tensor, present: Tensor, before: Tensor, sizes: Tensor, grain: int) -> None:
    """Fill ``present``, ``before`` and ``sizes``, as ``TokenUnions`` has them, from the table [lists, runs · grain]."""
    counts, (lists, runs) = torch.empty_like(present), present.shape
    with on_device(table):
        _count_kernel[(ceil_div(counts.numel(), 64),)](
            table, counts, present, counts.numel(), ROWS=64, GRAIN=grain, num_warps=4
        )
        _before_kernel[(lists,)](counts, before, sizes, runs, BN=min(2048, next_power_of_2(runs)), num_warps=4)


def write_lists(table: Tensor, begin: Tensor, before: Tensor, present: Tensor, lists: tuple[Tensor, Tensor]) -> None:
    """Fill tokens and words of the ``lists``."""
    runs, rows = present.shape[1], 64
    with on_device(table):
        _list_kernel[(ceil_div(runs, rows), table.shape[0])](
            table, begin, before, present, *lists, runs, ROWS=rows, GRAIN=table.shape[1] // runs, num_warps=4
        )
