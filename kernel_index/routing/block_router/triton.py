"""Score every legal block of a chunk of queries, then find the best ones of each row.

A mean key is three bfloat16 parts, which sum to its float32; the products of these parts are exact, so the scores are
those of float32 products at the rate of bfloat16.  They are stored as integers of the same order.  A row's best ones
are found by bisection between two such integers; the row stays in the registers of one warp, or of more if it is long.
"""

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import load_rows, load_tile
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device
from kernel_index.routing.triton_topk import LOW, NONE, rank_of, reached

SCORES_BYTES = 1 << 29
"""Of the scores of a chunk of queries."""


@jit
def _parts(x):
    """Three bfloat16 tensors whose sum is float32 x."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc, input_precision="ieee")


@jit
def _scores_kernel(
    q_ptr, parts_ptr, first_ptr, current_ptr, scores_ptr, q_b, q_t, q_h, part_b, part_n, part_h, part_p, legal_b,
    FIRST, STOP, BLOCKS, K, ROW,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The scores of QUERIES queries of one group for the blocks that one of them may be routed to.

    ``EXACT``: the query is bfloat16 already.  What is added to the product of the first parts is dropped where it is
    NaN: infinity has no second part.
    """
    G = K * GROUPS
    b, g = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    t = FIRST + (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    o_q = t + tl.arange(0, QUERIES)  # [QUERIES]
    m_q = o_q < STOP
    current = tl.load(current_ptr + b * legal_b + o_q, mask=m_q, other=-1)  # [QUERIES]
    first = tl.load(first_ptr + b * legal_b + o_q, mask=m_q, other=0)  # [QUERIES]
    low = tl.min(tl.where(current >= 0, first, LOW), 0) // BN
    high = tl.cdiv(tl.minimum(tl.max(current, 0), BLOCKS), BN)

    o_row = o_q.to(tl.int64) * q_t + g * GROUP * q_h
    if EXACT:
        q_first = load_rows(q_ptr + b * q_b, o_row, m_q, D, BLOCK_D)
    else:
        q_mean = tl.zeros((QUERIES, BLOCK_D), tl.float32)
        for h in range(0, GROUP):
            q_mean += load_rows(q_ptr + b * q_b, o_row + h * q_h, m_q, D, BLOCK_D).to(tl.float32)
        q_first, q_second, q_third = _parts(q_mean / GROUP)

    p_parts = parts_ptr + b * part_b + (g // GROUPS) * part_h
    p_scores = scores_ptr + ((b * (STOP - FIRST) + (o_q - FIRST)) * G + g) * ROW  # [QUERIES], 64 bits
    for i in range(low, high):
        k_first = load_tile(p_parts, i * BN, part_n, BLOCKS, BN, D, BLOCK_D)  # [BN, BLOCK_D]
        k_second = load_tile(p_parts + part_p, i * BN, part_n, BLOCKS, BN, D, BLOCK_D)
        k_third = load_tile(p_parts + 2 * part_p, i * BN, part_n, BLOCKS, BN, D, BLOCK_D)
        rest = _product(q_first, k_third, tl.zeros((QUERIES, BN), tl.float32), UPCAST)  # [QUERIES, BN]
        if not EXACT:
            rest = _product(q_third, k_first, rest, UPCAST)
            rest = _product(q_second, k_second, rest, UPCAST)
            rest = _product(q_second, k_first, rest, UPCAST)
        rest = _product(q_first, k_second, rest, UPCAST)
        score = _product(q_first, k_first, tl.where(rest == rest, rest, 0.0), UPCAST)
        o_n = i * BN + tl.arange(0, BN)
        tl.store(p_scores[:, None] + o_n[None, :], rank_of(score), mask=m_q[:, None] & (o_n < ROW)[None, :])


@jit
def _bound(best, LANES: tl.constexpr):
    """A rank that no fewer than LANES of a row reach, from its maxima ``best`` of parts: the least of LANES of them."""
    least = tl.cast(NONE + 1, tl.int64)
    if best.shape[0] >= LANES:
        parts = tl.max(tl.reshape(best, (best.shape[0] // LANES, LANES)), 0)
        least = tl.maximum(tl.min(parts, 0), NONE + 1).to(tl.int64)
    return least


@jit
def _ranks(p_scores, o_legal, legal):
    """The stored ranks of blocks that are number ``o_legal`` of ``legal`` ones; others may never have been stored."""
    return tl.where(o_legal.to(tl.uint32) < legal.to(tl.uint32), tl.load(p_scores), NONE)


@jit
def _store_any(p_row, p_indices, first, legal, least, need, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """The best ``need`` blocks of any row; ``least``: no fewer reach it.  Of equal scores the first blocks count.

    The eight parts of the row are counted at once, each in a byte of 64 bits: only an eighth of the row is scanned.
    """
    o_n = tl.arange(0, PARTS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [PARTS, COLUMNS]
    rank = _ranks(p_row + o_n, o_n - first, legal)
    least, count = reached(rank, need, least)
    least = least.to(tl.int32)
    if count != need:
        order = tl.cumsum(tl.reshape((rank == least).to(tl.int32), (PARTS * COLUMNS,)), 0)
        equal = need - tl.sum((rank > least).to(tl.int32))
        before = tl.sum((order < equal).to(tl.int32), 0)  # where the last one of them stands, if there is one
        rank = tl.where((rank == least) & ((o_n > before) | (equal <= 0)), NONE, rank)
    m_take = rank >= least
    shift = tl.arange(0, PARTS).to(tl.int64)[:, None] * 8
    packed = tl.sum(m_take.to(tl.int64) << shift, 0)  # [COLUMNS]
    counts = tl.cumsum(packed, 0) + tl.sum(packed, 0) * 0x0101010101010100  # and the sum of the bytes below
    tl.store(p_indices + ((counts[None, :] >> shift) & 255) - 1, o_n, mask=m_take)


@functools.partial(jit, do_not_specialize_on_alignment=["ROW"])  # so that loads have the layout that stores have
def _select_kernel(
    scores_ptr, first_ptr, current_ptr, indices_ptr, legal_b, FIRST, QUERIES, T, G, TOPK, BLOCKS, ROW, END,
    N: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The best blocks of ROWS rows, one after the other: ascending, the current block last, then −1.

    A row is PARTS parts, and a column has a block of each.  The best two of every column are looked at first: they are
    few, and seldom a third one is wanted.  Then the taken blocks of four parts are counted at once, each in a byte.
    """
    COLUMNS: tl.constexpr = N // PARTS
    TOGETHER: tl.constexpr = 4 if PARTS > 4 else PARTS
    o_column, o_slot = tl.arange(0, COLUMNS), tl.arange(0, KEPT)
    begin = tl.program_id(0) * ROWS
    for row in range(begin, tl.minimum(begin + ROWS, END)):
        local, g = row // G, row % G
        b, t = tl.cast(local // QUERIES, tl.int64), FIRST + local % QUERIES
        current = tl.load(current_ptr + b * legal_b + t)
        first = tl.load(first_ptr + b * legal_b + t)
        is_block = (current >= 0) & (current < BLOCKS)
        legal = tl.maximum(tl.minimum(current, BLOCKS) - first, 0)
        need = tl.minimum(TOPK - is_block.to(tl.int32), legal)
        p_row = scores_ptr + tl.cast(row, tl.int64) * ROW
        p_indices = indices_ptr + ((b * T + t) * G + g) * TOPK
        p_column, o_legal = p_row + o_column, o_column - first
        best = tl.full((COLUMNS,), NONE, tl.int32)
        second = tl.full((COLUMNS,), NONE, tl.int32)
        third = tl.full((COLUMNS,), NONE, tl.int32)
        ranks = ()
        for i in tl.static_range(PARTS):
            rank = _ranks(p_column + i * COLUMNS, o_legal + i * COLUMNS, legal)
            third = tl.maximum(third, tl.minimum(second, rank))
            second = tl.maximum(second, tl.minimum(best, rank))
            best = tl.maximum(best, rank)
            ranks += (rank,)
        least, count = reached(tl.join(best, second), need, _bound(best, KEPT))
        least = least.to(tl.int32)
        if (count == need) & (tl.max(third, 0) < least):
            before = 0
            for word in tl.static_range(PARTS // TOGETHER):
                taken = tl.zeros((COLUMNS,), tl.int32)
                for i in tl.static_range(TOGETHER):
                    taken += tl.where(ranks[word * TOGETHER + i] >= least, 1 << (8 * i), 0)
                total = tl.sum(taken, 0)
                slots = tl.cumsum(taken, 0) + total * 0x01010100  # and the sum of the bytes below
                for i in tl.static_range(TOGETHER):
                    p_slot = p_indices + (before - 1 + ((slots >> (8 * i)) & 255))
                    o_n = (word * TOGETHER + i) * COLUMNS + o_column
                    tl.store(p_slot, o_n, mask=ranks[word * TOGETHER + i] >= least)
                before += (total * 0x01010101) >> 24
        else:
            _store_any(p_row, p_indices, first, legal, _bound(best, KEPT), need, PARTS, COLUMNS)
        end = tl.where((o_slot == need) & is_block, current, -1)
        tl.store(p_indices + o_slot, end, mask=(o_slot >= need) & (o_slot < TOPK))


class Config(NamedTuple):
    """Queries of a program, blocks that it scores at once, warps, stages; ``registers``: of a program that selects."""

    queries: int
    step: int
    num_warps: int
    num_stages: int
    registers: dict[str, int]


MANY_PROGRAMS = {"maxnreg": 96}
"""Rows of 1024 blocks took 168 to 229 registers of a thread and spill none with 96; on sm_100 they would."""

MOST_WARPS = 4
"""Of a program with this limit: 8 warps and more would spill."""


def pick_config(exact: bool, target: Target) -> Config:
    """The largest that spill no register; three parts of a block's mean take six bytes of each of its values."""
    if interpreting():
        return Config(16, 16, 4, 1, {})
    if target.arch == 90:
        return Config(128, 64, 8, 3 if exact else 2, MANY_PROGRAMS)
    if target.arch == 100:
        return Config(128, 64, 8, 3, {}) if exact else Config(64, 32, 4, 2, {})
    return Config(64, 32, 4, 2, MANY_PROGRAMS if target.kind == "cuda" else {})


def parts_of(means: Tensor) -> Tensor:
    """bfloat16 [B, blocks, K, 3, D], which sum to float32 means [B, blocks, K, D]."""
    first = means.to(torch.bfloat16)
    rest = means - first
    second = rest.to(torch.bfloat16)
    return torch.stack((first, second, (rest - second).to(torch.bfloat16)), 3)


ROWS = 4
"""Rows of a program that selects."""

VALUES = 1024
"""Of a row, in the registers of one warp."""


def select_options(width: int, config: Config) -> dict[str, int]:
    """Of a launch that selects from rows of ``width`` blocks."""
    num_warps = min(32, max(1, width // VALUES))
    return {"num_warps": num_warps, **(config.registers if num_warps <= MOST_WARPS else {})}


def route(
    q: Tensor, means: Tensor, first: Tensor, current: Tensor, groups: int, indices: Tensor, limits: tuple[int, int]
) -> Tensor:
    """Fill ``indices`` int32 [B, T, G, topk].

    ``limits = (offset, block_size)``: no query t is routed beyond block ``(t + offset) // block_size``.
    """
    (B, T, H, D), (blocks, K), topk = q.shape, means.shape[1:3], indices.shape[3]
    exact = groups == H and q.dtype == torch.bfloat16
    config, parts = pick_config(exact, target_of(q.device)), parts_of(means)
    step = max(config.queries, SCORES_BYTES // (4 * B * groups * (blocks + 15)) // config.queries * config.queries)
    legal_b = 0 if first.shape[0] == 1 else T
    narrowest = max(16, next_power_of_2(blocks) // 4)  # so that there are at most three kernels
    # Behind the last row, too, as many scores as are looked at.
    scores = q.new_empty(B * min(step, T) * groups * (blocks + 15) + next_power_of_2(blocks) + 16, dtype=torch.int32)
    with on_device(q):
        for at in range(0, T if B else 0, step):
            stop = min(at + step, T)
            seen = max(1, min(blocks, (stop - 1 + limits[0]) // limits[1] + 1))
            rows, row = B * (stop - at) * groups, ceil_div(seen, 16) * 16
            width = max(next_power_of_2(seen), narrowest)
            _scores_kernel[(ceil_div(stop - at, config.queries), B * groups)](
                q, parts, first, current, scores, *q.stride()[:3], *parts.stride()[:4], legal_b,
                at, stop, blocks, K, row,
                D=D, BLOCK_D=dot_block(D), QUERIES=config.queries, BN=config.step, GROUP=H // groups,
                GROUPS=groups // K, EXACT=exact, UPCAST=interpreting(),
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            _select_kernel[(ceil_div(rows, ROWS),)](
                scores, first, current, indices, legal_b, at, stop - at, T, groups, topk, blocks, row, rows,
                N=width, KEPT=next_power_of_2(topk), ROWS=ROWS, PARTS=min(8, max(1, width // 128)),
                **select_options(width, config),
            )  # fmt: skip
    return indices
