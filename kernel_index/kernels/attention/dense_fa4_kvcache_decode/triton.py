"""Decoding in two launches: the keys of a row are split among programs, then the splits are merged in a fixed order.

The queries of a KV head (its G heads, and every new token) share one tile, so that keys are read once for all of them.
Names and units are those of ``core/triton/attention.py``; a row of a tile is one query with one head of the group.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    cache_slots,
    has_nan,
    load_rows,
    online_softmax,
    scores,
    weighted_sum,
    within,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import (
    ceil_div,
    dot_block,
    interpreting,
    next_power_of_2,
    on_device,
    processors,
    score_factors,
    strides,
)
from kernel_index.core.triton.merge_splits import allocate_splits, merge_splits, store_split


@jit
def _split_walk(
    b_q, k_ptr, v_ptr, table_ptr, b, kv_head, low, high, first_seen, length, start, end,
    k_page, k_slot, k_h, v_page, v_slot, v_h, table_b, table_s, inner, outer,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    PAGED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The softmax state of a tile of rows over the keys from ``low`` on and before ``high``."""
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    for first in range(low, high, BN):
        o_k = first + tl.arange(0, BN)  # [BN]
        m_k = within(o_k, first_seen, length)  # no other slot is read, neither keys nor the table
        b_page, o_slot = cache_slots(table_ptr, b, table_b, table_s, o_k, m_k, PAGE, PAGED)  # [BN]
        b_k = load_rows(k_ptr, b_page * k_page + o_slot * k_slot + kv_head * k_h, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
        m_seen = within(o_k[None, :], start[:, None], end[:, None])  # [BM, BN]
        logits = tl.where(m_seen, z * outer, float("-inf"))
        p, alpha, row_max, row_sum = online_softmax(logits, row_max, row_sum)
        b_v = load_rows(v_ptr, b_page * v_page + o_slot * v_slot + kv_head * v_h, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        acc = acc * alpha[:, None] + weighted_sum(p, b_v, m_seen, CAREFUL, UPCAST)
    return acc, row_max, row_sum


@jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, table_ptr, acc_ptr, max_ptr, sum_ptr,
    q_b, q_t, q_h, k_page, k_slot, k_h, v_page, v_slot, v_h, table_b, table_s,
    ROWS, QUERIES, KV, NEW, LEFT, RIGHT, SPLIT, inner, outer,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    PAGED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, ALIKE: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The softmax state of a tile of rows over SPLIT keys of one batch row and KV head; ALIKE: rows see the same."""
    split = tl.program_id(0).to(tl.int64)
    b, kv_head = (tl.program_id(1) // KV).to(tl.int64), (tl.program_id(1) % KV).to(tl.int64)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)  # [BM]
    query = o_m // G  # [BM]
    length = tl.load(length_ptr + b).to(tl.int32) + NEW
    position = length - QUERIES + query  # [BM]
    start = tl.maximum(position - LEFT, 0) if HAS_LEFT else tl.zeros_like(position)
    end = tl.minimum(position + RIGHT + 1, length) if HAS_RIGHT else tl.zeros_like(position) + length
    o_q = query.to(tl.int64) * q_t + (kv_head * G + o_m % G) * q_h
    b_q = load_rows(q_ptr + b * q_b, o_q, o_m < ROWS, D, BLOCK_D)  # [BM, BLOCK_D]
    first_seen = tl.maximum(length - QUERIES - LEFT, 0) if HAS_LEFT else 0  # by any query of the batch row
    low = tl.maximum((split * SPLIT).to(tl.int32), first_seen // BN * BN)
    high = tl.minimum((split * SPLIT).to(tl.int32) + SPLIT, length)
    acc, row_max, row_sum = _split_walk(
        b_q, k_ptr, v_ptr, table_ptr, b, kv_head, low, high, first_seen, length, start, end,
        k_page, k_slot, k_h, v_page, v_slot, v_h, table_b, table_s, inner, outer,
        D, BLOCK_D, BM, BN, PAGE, PAGED, CAPPED, UPCAST, False,
    )  # fmt: skip
    if not ALIKE:  # noqa: SIM102 (a constant: where rows are alike, the second walk is not compiled)
        if has_nan(acc):
            acc, row_max, row_sum = _split_walk(
                b_q, k_ptr, v_ptr, table_ptr, b, kv_head, low, high, first_seen, length, start, end,
                k_page, k_slot, k_h, v_page, v_slot, v_h, table_b, table_s, inner, outer,
                D, BLOCK_D, BM, BN, PAGE, PAGED, CAPPED, UPCAST, True,
            )  # fmt: skip
    store_split(
        acc_ptr, max_ptr, sum_ptr, acc, row_max, row_sum, split, tl.program_id(1), tl.num_programs(1), ROWS, o_m,
        D, BLOCK_D,
    )  # fmt: skip


class Config(NamedTuple):
    """Rows of a tile, keys that a program reads at once, keys of a split."""

    block_rows: int
    block_keys: int
    split: int


def pick_config(pairs: int, rows: int, capacity: int, width: int, programs: int) -> Config:
    """As few splits as keep ``programs`` busy twice over, none below 256 keys; a function of sizes alone."""
    block_rows = min(64, max(16, next_power_of_2(rows)))
    block_keys = 64 if width <= 128 else 32
    tiles = max(1, pairs * ceil_div(rows, block_rows))
    splits = max(1, min(ceil_div(capacity, 256), ceil_div(2 * programs, tiles)))
    return Config(
        block_rows, block_keys, max(block_keys, ceil_div(ceil_div(capacity, splits), block_keys) * block_keys)
    )


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    new: int,
    left: int,
    right: int,
    softcap: float,
    out: Tensor,
) -> Tensor:
    """Fill ``out`` [B, Lq, H, D]; a window of −1 is unlimited."""
    batch, queries, heads, width = q.shape
    page, kv_heads = k_cache.shape[1:3]
    if out.numel() == 0:
        return out
    group = heads // kv_heads
    rows, pairs = queries * group, batch * kv_heads
    capacity = page * (1 if table is None else table.shape[1])
    if capacity == 0:
        return out.zero_()
    config = pick_config(pairs, rows, capacity, width, processors(q))
    splits = allocate_splits(ceil_div(capacity, config.split), pairs, rows, q)
    inner, outer = score_factors(width**-0.5, softcap)
    table_strides = (0, 0) if table is None else table.stride()
    with on_device(q):
        _split_kernel[(splits.acc.shape[0], pairs, ceil_div(rows, config.block_rows))](
            q, k_cache, v_cache, lengths, lengths if table is None else table, *splits,
            *strides(q, k_cache, v_cache), *table_strides,
            rows, queries, kv_heads, new, left, right, config.split, inner, outer,
            G=group, D=width, BLOCK_D=dot_block(width), BM=config.block_rows, BN=config.block_keys, PAGE=page,
            PAGED=table is not None, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0,
            ALIKE=queries == 1 or (left < 0 and right < 0), CAPPED=softcap > 0, UPCAST=interpreting(),
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return merge_splits(splits, out, queries, kv_heads, group, config.block_rows)
