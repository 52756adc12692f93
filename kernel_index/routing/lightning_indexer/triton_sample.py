"""A row's best keys by a sample, on a Hopper GPU: see ``triton_collect.py``, whose kernel runs between these two.

A sample of as many keys as may be collected bounds the best scores: ``√(topk · many)`` keys are expected to reach it.
Whether ``topk`` of them did, and not more than there is space for, the last kernel sees.  It leaves other rows to the
kernels of ``triton.py``.
"""

import math

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import on_device
from kernel_index.routing.triton_topk import NONE, rank_of

PIECE = tl.constexpr(8)
"""Neighbouring keys of a sample: what the memory delivers at least."""

SEGMENTS = 4
"""Parts of a row, one after the other, that have their own lists of what was found in them."""


FEWEST = 2048
"""Keys of a sample at least, and of each segment that there is space for."""


def found_of(many: int) -> int:
    """Keys that there is space for in each row, where ``many`` are to be found in all."""
    return SEGMENTS * max(FEWEST, many) if many else 0


@jit
def _reached(rank, need, least, more):
    """See ``reached`` of ``triton_topk.py``; up to ``more`` integers more than ``need`` will do.

    Two steps of three go where the count would be right if it fell evenly: of 4096 scores it takes 5 for 13, or 8.
    """
    above = tl.maximum(tl.max(rank).to(tl.int64) + 1, least)  # ``over`` reach it, fewer than ``need``
    count, over, step = tl.sum((rank >= least.to(tl.int32)).to(tl.int32)), need * 0, need * 0
    while (count > need + more) & (above - least > 1):
        width = above - least
        part = (count - need - 0.5 * more) / (count - over)
        middle = tl.minimum(tl.maximum((part * width.to(tl.float32)).to(tl.int64), 1), width - 1)
        middle = least + tl.where(step % 3 == 2, width >> 1, middle)
        found = tl.sum((rank >= middle.to(tl.int32)).to(tl.int32))
        enough = found >= need
        least, above = tl.where(enough, middle, least), tl.where(enough, above, middle)
        count, over = tl.where(enough, found, count), tl.where(enough, over, found)
        step += 1
    return least


@jit
def _bound_kernel(
    ranks_ptr, start_ptr, end_ptr, bounds_ptr, bound_b, FIRST, QUERIES, TOPK, ROW, WANTED, MANY: tl.constexpr,
    SAMPLED: tl.constexpr,
):  # fmt: skip
    """The rank that about WANTED keys of a row reach; NONE where TOPK or fewer are seen, the least where MANY are.

    ``SAMPLED``: the ranks are those of a sample already, NONE where a key is not seen.
    """
    local, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + b * bound_b + FIRST + local)
    size = tl.load(end_ptr + b * bound_b + FIRST + local) - start
    bound = tl.where(size > TOPK, NONE + 1, NONE).to(tl.int64)
    if size > MANY:
        o_s = tl.arange(0, MANY)
        if SAMPLED:
            rank = tl.load(ranks_ptr + (b * QUERIES + local) * ROW + o_s)
            m_n = rank > NONE
        else:
            period = tl.cdiv(tl.cdiv(size, MANY // PIECE), PIECE) * PIECE
            o_n = start // PIECE * PIECE + o_s // PIECE * period + o_s % PIECE
            m_n = within(o_n, start, start + size)
            rank = tl.load(ranks_ptr + (b * QUERIES + local) * ROW + o_n, mask=m_n, other=NONE)
        need = tl.maximum(WANTED * tl.sum(m_n.to(tl.int32), 0) // size, 1)
        bound = _reached(rank, need, bound, need // 16)
    tl.store(bounds_ptr + b * QUERIES + local, bound.to(tl.int32))


@jit
def _pick_kernel(
    found_ptr, counts_ptr, bounds_ptr, best_ptr, tokens_ptr, done_ptr, TOPK, SPACE, MANY: tl.constexpr,
    SCORED: tl.constexpr,
):  # fmt: skip
    """The best TOPK of the keys that were found, of equal ones the first, ascending; ``done``: that they are stored.

    Of SPACE in each list; ``SCORED``: with their scores, not with ranks.
    """
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bounds_ptr + row).to(tl.int64)
    if bound == NONE:
        return
    p_counts = counts_ptr + row * 4
    a, b, c, d = tl.load(p_counts), tl.load(p_counts + 1), tl.load(p_counts + 2), tl.load(p_counts + 3)
    total = a + b + c + d
    if (total < TOPK) | (total > MANY):
        return
    o_found = tl.arange(0, MANY)
    at = o_found + tl.where(o_found >= a, SPACE - a, 0)
    at += tl.where(o_found >= a + b, SPACE - b, 0) + tl.where(o_found >= a + b + c, SPACE - c, 0)
    key = tl.load(found_ptr + row * (4 * SPACE) + at, mask=o_found < total, other=0)
    rank, token = (key >> 32).to(tl.int32), key.to(tl.int32)
    if SCORED:
        rank = rank_of(rank.to(tl.float32, bitcast=True))
    rank = tl.where(o_found < total, rank, NONE)
    least = _reached(rank, total * 0 + TOPK, bound, 0)
    m_above, m_equal = rank > least.to(tl.int32), rank == least.to(tl.int32)
    equal = TOPK - tl.sum(m_above.to(tl.int32), 0)
    place = tl.cumsum(m_above.to(tl.int32) + (m_equal.to(tl.int32) << 16), 0)  # two sums of at most MANY
    m_take = m_above | (m_equal & ((place >> 16) <= equal))
    slot = row * TOPK + (place & 0xFFFF) + tl.minimum(place >> 16, equal) - 1
    tl.store(best_ptr + slot, rank, mask=m_take)
    tl.store(tokens_ptr + slot, token, mask=m_take)
    tl.store(done_ptr + row, 1)


def bound(ranks: Tensor, rows: tuple[Tensor, Tensor], first: int, topk: int, bounds: Tensor, many: int = 0) -> None:
    """Fill ``bounds`` int32 [B, T'] from ranks [B, T', S'], of which ``many`` are sampled, or from samples [T', S']."""
    (start, end), B, queries = rows, 1 if ranks.ndim == 2 else ranks.shape[0], ranks.shape[-2]
    sampled, bound_b = not many, 0 if start.ndim == 1 or start.shape[0] == 1 else start.shape[1]
    many = many or ranks.shape[-1]
    _bound_kernel[(queries, B)](
        ranks, start, end, bounds, bound_b, first, queries, topk, ranks.shape[-1], math.isqrt(topk * many), MANY=many,
        SAMPLED=sampled, num_warps=4,
    )  # fmt: skip


def pick(
    found: Tensor, counts: Tensor, bounds: Tensor, picked: tuple[Tensor, Tensor], done: Tensor, many: int = 0
) -> None:
    """Fill rows of ``picked`` from lists of ``many`` ranks, or from lists of scores [T', SEGMENTS, many + 16]."""
    scored, space = not many, many or found.shape[2]
    many = many or space - 16
    options = {"num_warps": 8, "maxnreg": 64} if many <= 4096 else {"num_warps": 16}
    _pick_kernel[(bounds.numel(),)](
        found, counts, bounds, *picked, done, picked[0].shape[2], space, MANY=many, SCORED=scored,
        **options,
    )  # fmt: skip


def select(
    ranks: Tensor, start: Tensor, end: Tensor, picked: tuple[Tensor, Tensor], first: int, buffers: tuple[Tensor, Tensor]
) -> None:
    """Fill the rows of ``picked`` that this way finds, and 1 in ``done`` for each.

    ``buffers``: ``found`` int64 [B, T', found_of(...)] and ``done`` int32 [B, T'], zeros.
    """
    from kernel_index.routing.lightning_indexer import triton_collect

    (B, queries, topk), (found, done) = picked[0].shape, buffers
    many = found.shape[2] // SEGMENTS
    bounds = torch.empty(B, queries, dtype=torch.int32, device=ranks.device)
    counts = torch.empty(B, queries, SEGMENTS, dtype=torch.int32, device=ranks.device)
    bound_b = 0 if start.shape[0] == 1 else start.shape[1]
    with on_device(ranks):
        bound(ranks, (start, end), first, topk, bounds, many)
        triton_collect.collect(ranks, bounds, (start, end, bound_b, first), found, counts)
        pick(found, counts, bounds, picked, done, many)
