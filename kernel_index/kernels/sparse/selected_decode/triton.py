"""Decoding over selected blocks: programs take splits of a query's blocks, which are then merged in a fixed order.

The query heads that share a selection are the rows of a program's tile, and only its blocks are read, through the page
table where there is one.  Names and units are those of ``core/triton/attention.py``.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import cache_slots, load_rows, online_softmax, scores, weighted_sum
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import (
    ceil_div,
    dot_block,
    interpreting,
    on_device,
    processors,
    score_factors,
    strides,
)
from kernel_index.core.triton.merge_splits import allocate_splits, merge_splits, store_split


@jit
def _selected_kernel(
    q_ptr, k_ptr, v_ptr, selected_ptr, start_ptr, position_ptr, table_ptr, acc_ptr, max_ptr, sum_ptr,
    k_page, k_slot, k_h, v_page, v_slot, v_h, table_b, table_s,
    QUERIES, GROUPS, SELECTED, PER_SPLIT, BLOCK, inner, outer,
    GROUPS_PER_KV: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr, SINGLE: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The softmax state of one query's J heads of one group over PER_SPLIT of its SELECTED blocks."""
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)  # a pair is a query and a group
    query = pair // GROUPS
    b, kv_head = query // QUERIES, (pair % GROUPS) // GROUPS_PER_KV
    o_m = tl.arange(0, BM)  # [BM]
    b_q = load_rows(q_ptr, (pair * J + o_m) * D, o_m < J, D, BLOCK_D)  # [BM, BLOCK_D]
    start, position = tl.load(start_ptr + query), tl.load(position_ptr + query)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    begin = split * PER_SPLIT
    end = tl.minimum(begin + PER_SPLIT, SELECTED)
    for i in range(begin, end, BN if SINGLE else 1):
        for first in range(0, BLOCK, BN):
            o_n = first + tl.arange(0, BN)  # [BN]
            if SINGLE:  # blocks of one token: BN of them at once
                block = tl.load(selected_ptr + pair * SELECTED + i + o_n, mask=i + o_n < end, other=-1).to(tl.int64)
                o_k = block
                m_k = (o_k >= start) & (o_k <= position)
            else:
                block = tl.load(selected_ptr + pair * SELECTED + i).to(tl.int64)
                o_k = block * BLOCK + o_n
                m_k = (o_n < BLOCK) & (o_k >= start) & (o_k <= position)
            m_k = m_k & (block >= 0)  # no other slot is read
            b_page, o_slot = cache_slots(table_ptr, b, table_b, table_s, o_k, m_k, PAGE, PAGED)  # [BN]
            b_k = load_rows(k_ptr, b_page * k_page + o_slot * k_slot + kv_head * k_h, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
            z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
            logits = tl.where(m_k[None, :], z * outer, float("-inf"))
            p, alpha, row_max, row_sum = online_softmax(logits, row_max, row_sum)
            b_v = load_rows(v_ptr, b_page * v_page + o_slot * v_slot + kv_head * v_h, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
            acc = acc * alpha[:, None] + weighted_sum(p, b_v, m_k, False, UPCAST)
    store_split(
        acc_ptr, max_ptr, sum_ptr, acc, row_max, row_sum, split.to(tl.int64), pair, tl.num_programs(1), J, o_m,
        D, BLOCK_D,
    )  # fmt: skip


class Config(NamedTuple):
    """Heads of a tile, keys that a program reads at once, selected blocks of a split."""

    block_rows: int
    block_keys: int
    split: int


def pick_config(pairs: int, heads: int, selected: int, block_size: int, width: int, programs: int) -> Config:
    """As few splits as keep ``programs`` busy twice over; a function of sizes alone."""
    block_keys = min(64 if width <= 128 else 32, dot_block(selected if block_size == 1 else block_size))
    splits = max(1, min(selected, ceil_div(2 * programs, max(1, pairs))))
    return Config(dot_block(heads), block_keys, ceil_div(selected, splits))


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    selected: Tensor,
    start: Tensor,
    position: Tensor,
    table: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    """Fill ``out`` [B, Lq, H, D]; ``selected`` int32 or int64 [B, Lq, G, n] with −1 for none."""
    (batch, queries, heads, width), (groups, count) = q.shape, selected.shape[2:]
    if out.numel() == 0 or count == 0:
        return out.zero_()
    pairs, each = batch * queries * groups, heads // groups
    config = pick_config(pairs, each, count, block_size, width, processors(q))
    splits = allocate_splits(ceil_div(count, config.split), pairs, each, q)
    inner, outer = score_factors(scale, softcap)
    table_strides = (0, 0) if table is None else table.stride()
    with on_device(q):
        _selected_kernel[(splits.acc.shape[0], pairs)](
            q, k_cache, v_cache, selected, start, position, start if table is None else table, *splits,
            *strides(k_cache, v_cache), *table_strides,
            queries, groups, count, config.split, block_size, inner, outer,
            GROUPS_PER_KV=groups // k_cache.shape[2], J=each, D=width, BLOCK_D=dot_block(width),
            BM=config.block_rows, BN=config.block_keys, PAGE=k_cache.shape[1], PAGED=table is not None,
            SINGLE=block_size == 1, CAPPED=softcap > 0, UPCAST=interpreting(), num_warps=4, num_stages=2,
        )  # fmt: skip
        return merge_splits(splits, out, 1, groups, each, config.block_rows)
