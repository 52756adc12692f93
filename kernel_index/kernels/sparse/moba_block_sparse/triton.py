"""A step of decoding in kernels: write the new tokens and complete block means, score blocks, select the best ones.

Lengths and pages are read on the device, so a captured graph serves every later step; grids follow the capacity.
Attention over the selected blocks is ``selected_decode``'s.  Names are those of ``core/triton/attention.py``.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import OUTGROWN, cache_slots, load_rows, store_rows
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import (
    ceil_div,
    dot_block,
    interpreting,
    next_power_of_2,
    processors,
)
from kernel_index.kernels.sparse.selected_decode.api import attend_into, launch_for
from kernel_index.kvcache.selected import Visible

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@jit
def _append_kernel(
    k_ptr, v_ptr, new_k_ptr, new_v_ptr, means_ptr, length_ptr, table_ptr, new_b, new_t, new_h, table_b, NEW, UNITS,
    KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Write the new tokens of one block of one KV head, and the block's mean if they complete it.

    Keys before the new ones are read in the cache, where no program writes them.
    """
    b, h = (tl.program_id(1) // KV).to(tl.int64), (tl.program_id(1) % KV).to(tl.int64)
    before = tl.load(length_ptr + b).to(tl.int32)
    block = before // BLOCK + tl.program_id(0)
    end = tl.minimum((block + 1) * BLOCK, before + NEW)
    complete = end == (block + 1) * BLOCK
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(tl.where(complete, block * BLOCK, tl.maximum(block * BLOCK, before)), end, BN):
        o_n = first + tl.arange(0, BN)  # [BN]
        m_n = o_n < end
        m_new = m_n & (o_n >= before)
        b_page, o_slot = cache_slots(table_ptr, b, table_b, 1, o_n, m_n, PAGE, PAGED)
        o_row = ((b_page * PAGE + o_slot) * KV + h) * D  # [BN]
        o_new = b * new_b + (o_n - before).to(tl.int64) * new_t + h * new_h
        b_k = load_rows(new_k_ptr, o_new, m_new, D, BLOCK_D)  # [BN, BLOCK_D]
        store_rows(k_ptr, o_row, m_new, b_k, D, BLOCK_D, False)
        store_rows(v_ptr, o_row, m_new, load_rows(new_v_ptr, o_new, m_new, D, BLOCK_D), D, BLOCK_D, False)
        b_old = load_rows(k_ptr, o_row, m_n & (o_n < before) & complete, D, BLOCK_D)
        total += tl.sum(tl.where(m_new[:, None], b_k, b_old).to(tl.float32), 0)
    last = (block + 1) * BLOCK - 1
    if PAGED:
        page = tl.load(table_ptr + b * table_b + last // PAGE, mask=complete, other=0).to(tl.int64)
        o_mean = page * UNITS + last % PAGE // (PAGE // UNITS)
    else:
        o_mean = b * UNITS + block
    o_d = tl.arange(0, BLOCK_D)
    tl.store(means_ptr + (o_mean * KV + h) * D + o_d, total / BLOCK, mask=(o_d < D) & complete)


@jit
def _mean_rows(
    means_ptr, table_ptr, b, h, table_b, o_n, m_n, UNITS,
    KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Pointers to the means of blocks ``o_n`` [BN]: each is stored with its block's last token."""
    if PAGED:
        last = (o_n + 1) * BLOCK - 1
        page = tl.load(table_ptr + b * table_b + last // PAGE, mask=m_n, other=0).to(tl.int64)
        o_mean = page * UNITS + last % PAGE // (PAGE // UNITS)
    else:
        o_mean = b * UNITS + o_n
    return means_ptr + (o_mean * KV + h) * D


@jit
def _mean_query(p_q, m_row, first, q_h, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """Columns ``first`` to ``first + N`` of the mean of J heads from ``p_q`` on, float32."""
    o_d = first + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for j in tl.static_range(J):
        total += tl.load(p_q + j * q_h + o_d, mask=(o_d < D) & m_row, other=0.0).to(tl.float32)
    return total / J


@jit
def _score_kernel(
    q_ptr, means_ptr, length_ptr, table_ptr, work_ptr, q_b, q_t, q_h, table_b, AT, QUERIES, NEW, LEFT, BLOCKS, UNITS,
    KV: tl.constexpr, E: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, PAGED: tl.constexpr, HAS_LEFT: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of past blocks for ROWS rows of a KV head, each a query and one of its E groups of J heads.

    Each mean is read once, CHUNK columns at a time, so that a thread adds up most of a product on its own.
    """
    b, h = (tl.program_id(0) // KV).to(tl.int64), tl.program_id(0) % KV
    length = tl.load(length_ptr + b).to(tl.int32) + NEW
    low = tl.maximum(length - QUERIES - LEFT, 0) // BLOCK // BN * BN if HAS_LEFT else 0
    high = tl.minimum(tl.maximum(length - 1, 0) // BLOCK, BLOCKS)  # the last query's block: all before it are complete
    first_row = tl.program_id(2) * ROWS
    queries = ()  # ROWS times BLOCK_D / CHUNK blocks [CHUNK]
    for r in tl.static_range(ROWS):
        row = first_row + r
        p_q = q_ptr + b * q_b + (row // E).to(tl.int64) * q_t + ((h * E + row % E) * J).to(tl.int64) * q_h
        for c in tl.static_range(BLOCK_D // CHUNK):
            queries += (_mean_query(p_q, row < QUERIES * E, c * CHUNK, q_h, J, D, CHUNK),)
    o_d = tl.arange(0, CHUNK)
    for first in range(low + tl.program_id(1) * BN, high, tl.num_programs(1) * BN):
        o_n = first + tl.arange(0, BN)  # [BN]
        m_n = o_n < high
        p_means = _mean_rows(means_ptr, table_ptr, b, h, table_b, o_n, m_n, UNITS, KV, D, BLOCK, PAGE, PAGED)
        means = ()  # BLOCK_D / CHUNK blocks [BN, CHUNK]
        for c in tl.static_range(BLOCK_D // CHUNK):
            m_d = m_n[:, None] & (c * CHUNK + o_d < D)[None, :]
            means += (tl.load(p_means[:, None] + (c * CHUNK + o_d)[None, :], mask=m_d, other=0.0),)
        for r in tl.static_range(ROWS):
            row = first_row + r
            products = means[0] * queries[r * (BLOCK_D // CHUNK)][None, :]  # [BN, CHUNK]
            for c in tl.static_range(1, BLOCK_D // CHUNK):
                products += means[c] * queries[r * (BLOCK_D // CHUNK) + c][None, :]
            o_row = ((b * QUERIES + row // E) * KV + h) * E + row % E
            tl.store(work_ptr + AT + o_row * BLOCKS + o_n, tl.sum(products, 1), mask=m_n & (row < QUERIES * E))


@jit
def _dot_score_kernel(
    q_ptr, means_ptr, length_ptr, table_ptr, work_ptr, q_b, q_t, q_h, table_b, AT, QUERIES, NEW, LEFT, BLOCKS, UNITS,
    KV: tl.constexpr, E: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, PAGED: tl.constexpr, HAS_LEFT: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``_score_kernel``, for many rows: one product for all of them."""
    b, h = (tl.program_id(0) // KV).to(tl.int64), tl.program_id(0) % KV
    length = tl.load(length_ptr + b).to(tl.int32) + NEW
    low = tl.maximum(length - QUERIES - LEFT, 0) // BLOCK // BN * BN if HAS_LEFT else 0
    high = tl.minimum(tl.maximum(length - 1, 0) // BLOCK, BLOCKS)
    o_r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_r = o_r < QUERIES * E
    o_q = b * q_b + (o_r // E).to(tl.int64) * q_t + ((h * E + o_r % E) * J).to(tl.int64) * q_h
    b_q = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for j in tl.static_range(J):
        b_q += load_rows(q_ptr, o_q + j * q_h, m_r, D, BLOCK_D).to(tl.float32)
    b_q = b_q / J
    o_row = ((b * QUERIES + o_r // E) * KV + h) * E + o_r % E
    for first in range(low + tl.program_id(1) * BN, high, tl.num_programs(1) * BN):
        o_n = first + tl.arange(0, BN)  # [BN]
        m_n = o_n < high
        p_means = _mean_rows(means_ptr, table_ptr, b, h, table_b, o_n, m_n, UNITS, KV, D, BLOCK, PAGE, PAGED)
        o_d = tl.arange(0, BLOCK_D)
        b_means = tl.load(p_means[:, None] + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        z = tl.dot(b_means, tl.trans(b_q), input_precision=PRECISION)  # [BN, ROWS]
        p_score = work_ptr + AT + (o_row * BLOCKS)[None, :] + o_n[:, None]
        tl.store(p_score, z, mask=m_n[:, None] & m_r[None, :])


@jit
def _ranks(p_scores, first, current, CHUNK: tl.constexpr):
    """int32 of the order of the scores of blocks from ``first`` on [CHUNK]; LOWEST where a block is not routable."""
    o_n = first + tl.arange(0, CHUNK)
    score = tl.load(p_scores + o_n, mask=o_n < current, other=0.0) + 0.0  # −0 becomes 0
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(score != score, HIGHEST, bits ^ ((bits >> 31) & HIGHEST))  # NaN of either sign is above +∞
    return tl.where(o_n < current, rank, LOWEST)


@jit
def _count_above(p_scores, ranks, bound, first, current, CHUNK: tl.constexpr, ONE: tl.constexpr):
    """How many blocks have a rank above ``bound``, which is LOWEST at least; ONE: ``ranks`` are those of all blocks."""
    if ONE:
        total = tl.sum((ranks > bound).to(tl.int32), 0)
    else:
        total = tl.zeros((), tl.int32)
        for begin in range(first, current, CHUNK):
            total += tl.sum((_ranks(p_scores, begin, current, CHUNK) > bound).to(tl.int32), 0)
    return total


@jit
def _select_kernel(
    length_ptr, work_ptr, AT, QUERIES, NEW, LEFT, BLOCKS, TOPK,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, CHUNK: tl.constexpr, KEPT: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """The best TOPK − 1 routable blocks of a query and group, ascending, then its current block, then −1.

    The rank of the last one is found bit by bit; of the blocks that have exactly this rank the first ones are taken.
    """
    row = tl.program_id(0).to(tl.int64)
    query = row // GROUPS
    b, t = query // QUERIES, (query % QUERIES).to(tl.int32)
    position = tl.load(length_ptr + b).to(tl.int32) + NEW - QUERIES + t
    current = tl.where(position >= 0, position // BLOCK, 0)
    first = tl.maximum(position - LEFT, 0) // BLOCK if HAS_LEFT else 0
    want = tl.minimum(TOPK - 1, current - first)
    p_scores = work_ptr + AT + row * BLOCKS
    p_selected = work_ptr.to(tl.pointer_type(tl.int32)) + row * TOPK
    if current > BLOCKS:  # a captured step, replayed for a row that has outgrown its memory: the output becomes NaN
        o_slot = tl.arange(0, KEPT)
        tl.store(p_selected + o_slot, tl.full((KEPT,), OUTGROWN, tl.int32), mask=o_slot < TOPK)
        return
    ranks = _ranks(p_scores, first, current, CHUNK)  # [CHUNK]
    least, bit = tl.full((), LOWEST, tl.int32), tl.full((), 31, tl.int32)
    found = current - first
    while (bit >= 0) & (found != want):
        tried = least ^ (1 << bit)  # for the sign, this takes a bit away
        count = _count_above(p_scores, ranks, tried - 1, first, current, CHUNK, ONE)
        if count >= want:
            least, found = tried, count
        bit -= 1
    above = tl.zeros((), tl.int32)
    if found != want:  # a tie at the last place
        above = _count_above(p_scores, ranks, least, first, current, CHUNK, ONE)
    taken, equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for begin in range(first, current, CHUNK):
        if not ONE:
            ranks = _ranks(p_scores, begin, current, CHUNK)
        o_n = begin + tl.arange(0, CHUNK)
        m_equal = ((ranks == least) & (o_n < current)).to(tl.int32)
        place = equal + tl.cumsum(m_equal, 0)
        m_best = (ranks > least) | ((m_equal == 1) & (place <= want - above))
        slot = taken + tl.cumsum(m_best.to(tl.int32), 0) - 1
        tl.store(p_selected + slot, o_n, mask=m_best & (slot < want))
        taken += tl.sum(m_best.to(tl.int32), 0)
        equal += tl.sum(m_equal, 0)
    o_slot = want + tl.arange(0, KEPT)
    last = tl.where((o_slot == want) & (position >= 0), current, -1)
    tl.store(p_selected + o_slot, last, mask=o_slot < TOPK)


class Scoring(NamedTuple):
    """Rows of a program, blocks that it scores at once, warps; programs of a processor.

    ``chunk``: columns that are read at once where products are added up by threads; 0 where tensor cores make them.
    """

    rows: int
    step: int
    chunk: int
    num_warps: int
    programs: int


FEW_ROWS = 4


def pick_scoring(rows: int, width: int) -> Scoring:
    """Few rows leave tensor cores idle, and threads are exact: float32 products and sums.

    Four programs of 128 registers share a processor: no more than run at once, so that none is left for the end.
    """
    step = 16 if interpreting() else 64
    if rows <= FEW_ROWS:
        return Scoring(max(1, rows), step, min(32, dot_block(width)), 4, 4)
    return Scoring(min(64, dot_block(rows)), step if width <= 128 else min(32, step), 0, 4, 4)


def precision(target: Target) -> str:
    """Three products of TF32 halves err by about 2⁻²², as float32 sums of this length do."""
    return "tf32x3" if target.kind == "cuda" and target.arch in (90, 100) else "ieee"


MOST_RANKED = 16384
"""Blocks whose ranks the registers of a program hold; of more, they are read again for each bit."""

LARGEST_BLOCK = 2**30
"""A larger block is never complete either, and its end is an int32."""


class Geometry(NamedTuple):
    """What the launches of a step take from its sizes alone, and where its memory holds what.

    ``memory``: float32 elements, of which the first hold the selections and those from ``at`` on the scores.
    """

    topk: int
    blocks: int
    at: int
    memory: int
    score_kernel: Any
    score_grid: tuple[int, int, int]
    score: dict[str, Any]
    select: dict[str, Any]


@functools.lru_cache(1024)
def geometry_of(
    shape: torch.Size, kv_heads: int, page: int, columns: int, groups: int, block_size: int, topk: int, windowed: bool,
    target: Target, many: int,
) -> Geometry:  # fmt: skip
    """For queries of ``shape`` on a device of ``many`` processors; ``columns`` of the table, 0 without one."""
    batch, queries, heads, width = shape
    blocks = max(1, ceil_div(page * max(1, columns), block_size))
    pairs, rows = batch * queries * groups, queries * (groups // kv_heads)
    at = ceil_div(pairs * topk, 16) * 16
    c = pick_scoring(rows, width)
    tiles = ceil_div(rows, c.rows)
    splits = max(1, min(ceil_div(blocks, c.step), c.programs * many // max(1, batch * kv_heads * tiles)))
    score = {
        "KV": kv_heads, "E": groups // kv_heads, "J": heads // groups, "D": width, "BLOCK_D": dot_block(width),
        "BLOCK": min(block_size, LARGEST_BLOCK), "PAGE": page, "PAGED": columns > 0, "HAS_LEFT": windowed,
        "ROWS": c.rows, "BN": c.step, "num_warps": c.num_warps,
    }  # fmt: skip
    score |= {"CHUNK": c.chunk} if c.chunk else {"PRECISION": precision(target), "num_stages": 2}
    chunk = min(MOST_RANKED, max(16, next_power_of_2(blocks)))
    select = {
        "GROUPS": groups, "BLOCK": score["BLOCK"], "HAS_LEFT": windowed, "CHUNK": chunk, "KEPT": next_power_of_2(topk),
        "ONE": blocks <= chunk, "num_warps": min(16, max(4, chunk // 512)),
    }  # fmt: skip
    kernel = _score_kernel if c.chunk else _dot_score_kernel
    grid = (batch * kv_heads, splits, tiles)
    return Geometry(topk, blocks, at, at + pairs * blocks, kernel, grid, score, select)


def geometry_for(q: Tensor, k_cache: Tensor, seen: Visible, groups: int, block_size: int, topk: int) -> Geometry:
    page, kv_heads = k_cache.shape[1:3]
    topk = min(topk, max(1, ceil_div(page * max(1, seen.widest), block_size)))
    sizes = (q.shape, kv_heads, page, seen.columns, groups, block_size, topk, seen.left >= 0)
    return geometry_of(*sizes, target_of(q.device), processors(q))


def append(
    k_cache: Tensor, v_cache: Tensor, means: Tensor, k: Tensor, v: Tensor, seen: Visible, block_size: int
) -> None:
    """Write k and v [B, Ln, K, D], of the same strides, and the means of the blocks that they complete."""
    (batch, new, kv_heads, width), page, table = k.shape, k_cache.shape[1], seen.table
    lengths = seen.lengths
    block_size = min(block_size, LARGEST_BLOCK)
    _append_kernel[((new - 2) // block_size + 2, batch * kv_heads)](
        k_cache, v_cache, k, v, means, lengths, lengths if table is None else table, *k.stride()[:3],
        0 if table is None else table.stride(0), new, means.shape[1],
        KV=kv_heads, D=width, BLOCK_D=dot_block(width), BN=min(64, next_power_of_2(block_size)), BLOCK=block_size,
        PAGE=page, PAGED=table is not None, num_warps=4,
    )  # fmt: skip


def select(q: Tensor, means: Tensor, seen: Visible, g: Geometry, work: Tensor) -> None:
    """Write the selections, int32 [B, Lq, G, topk], to the beginning of ``work``."""
    (batch, queries), table, lengths = q.shape[:2], seen.table, seen.lengths
    g.score_kernel[g.score_grid](
        q, means, lengths, lengths if table is None else table, work, *q.stride()[:3],
        0 if table is None else table.stride(0), g.at, queries, seen.new, seen.left, g.blocks, means.shape[1],
        **g.score,
    )  # fmt: skip
    _select_kernel[(batch * queries * g.select["GROUPS"],)](
        lengths, work, g.at, queries, seen.new, seen.left, g.blocks, g.topk, **g.select
    )


def step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    seen: Visible,
    block_size: int,
    topk: int,
    groups: int,
    scale: float,
    softcap: float,
    sink: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Fill ``out`` [B, Lq, H, D] by attention over the blocks that each query selects, once all keys are written.

    One buffer holds the selections, and behind them first the scores, then the states of the splits.
    """
    g = geometry_for(q, k_cache, seen, groups, block_size, topk)
    launch = launch_for(q, k_cache, seen, groups, g.topk, block_size)
    work = q.new_empty(max(g.memory, g.at + launch.states), dtype=torch.float32)
    select(q, means, seen, g, work)
    return attend_into(out, q, k_cache, v_cache, work, seen, launch, g.topk, scale, softcap, (work, g.at), sink)
