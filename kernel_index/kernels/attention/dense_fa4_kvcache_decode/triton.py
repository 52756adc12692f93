"""Decoding in two launches: the keys of a row are split among programs, then the parts are joined in a fixed order.

The queries of a key head (its G heads, and every new token) share one tile, so that keys are read once for all of them.
Exponentials are base 2; ``outer`` carries log2(e).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import LOG2E, dot, narrow, tanh
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2, on_device, processors
from kernel_index.core.triton.splits import join_kernel


@triton.jit
def _part_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, table_ptr, acc_ptr, max_ptr, sum_ptr,
    q_b, q_t, q_h, k_outer, k_inner, k_h, v_outer, v_inner, v_h, table_b, table_s,
    ROWS, QUERIES, KV, NEW, LEFT, RIGHT, SPLIT, inner, outer,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    PAGED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    b, h = (tl.program_id(1) // KV).to(tl.int64), (tl.program_id(1) % KV).to(tl.int64)
    row = tl.program_id(2) * BM + tl.arange(0, BM)  # token of the step, then head of the group
    token, column = row // G, tl.arange(0, BLOCK_D)
    total = tl.load(length_ptr + b).to(tl.int32) + NEW
    position = total - QUERIES + token
    start = tl.maximum(position - LEFT, 0) if HAS_LEFT else tl.zeros_like(position)
    end = tl.minimum(position + RIGHT + 1, total) if HAS_RIGHT else tl.zeros_like(position) + total
    inside = (row < ROWS)[:, None] & (column < D)[None, :]
    q_at = q_ptr + b * q_b + token[:, None].to(tl.int64) * q_t + (h * G + row % G)[:, None] * q_h + column[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    low = (split * SPLIT).to(tl.int32)
    high = tl.minimum(low + SPLIT, total)
    if HAS_LEFT:  # no query of the row sees anything before this
        low = tl.maximum(low, tl.maximum(total - QUERIES - LEFT, 0) // BN * BN)
    for at in range(low, high, BN):
        key = at + tl.arange(0, BN)
        held = key < total  # nothing behind the last token is read, neither keys nor the table
        if PAGED:
            block = tl.load(table_ptr + b * table_b + (key // PAGE) * table_s, mask=held, other=0).to(tl.int64)
            place = key % PAGE
        else:
            block = tl.zeros_like(key).to(tl.int64) + b
            place = key
        exists = held[:, None] & (column < D)[None, :]
        k_at = k_ptr + (block * k_outer + place.to(tl.int64) * k_inner + h * k_h)[:, None] + column[None, :]
        v_at = v_ptr + (block * v_outer + place.to(tl.int64) * v_inner + h * v_h)[:, None] + column[None, :]
        z = dot(q, tl.trans(tl.load(k_at, mask=exists, other=0.0)), UPCAST)
        if CAPPED:
            z = tanh(z * inner)
        z = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), z * outer, float("-inf"))
        new_m = tl.maximum(m, tl.max(z, 1))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(z - safe_m[:, None])
        shrink = tl.exp2(m - safe_m)
        v = tl.load(v_at, mask=exists, other=0.0)
        acc = acc * shrink[:, None] + dot(narrow(p, v.dtype, UPCAST), v, UPCAST)
        sums = sums * shrink + tl.sum(p, 1)
        m = new_m
    place_of = (split * tl.num_programs(1) + tl.program_id(1)) * ROWS + row
    tl.store(max_ptr + place_of, m, mask=row < ROWS)
    tl.store(sum_ptr + place_of, sums, mask=row < ROWS)
    tl.store(acc_ptr + place_of[:, None] * D + column[None, :], acc, mask=inside)


class Config(NamedTuple):
    """Rows of a tile, keys of a step, keys of a split."""

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
    splits, tiles = ceil_div(capacity, config.split), ceil_div(rows, config.block_rows)
    acc = torch.empty((splits, pairs, rows, width), dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty((2, splits, pairs, rows), dtype=torch.float32, device=q.device)
    scale = width**-0.5
    inner, outer = (scale / softcap, softcap * LOG2E.value) if softcap else (1.0, scale * LOG2E.value)
    block_d, upcast = max(16, next_power_of_2(width)), interpreting()
    table_strides = (0, 0) if table is None else table.stride()
    with on_device(q):
        _part_kernel[(splits, pairs, tiles)](
            q, k_cache, v_cache, lengths, lengths if table is None else table, acc, maxima, sums,
            *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *table_strides,
            rows, queries, kv_heads, new, left, right, config.split, inner, outer,
            G=group, D=width, BLOCK_D=block_d, BM=config.block_rows, BN=config.block_keys, PAGE=page,
            PAGED=table is not None, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, CAPPED=softcap > 0, UPCAST=upcast,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        join_kernel[(pairs, tiles)](
            acc, maxima, sums, out, rows, queries, kv_heads, splits, pairs * rows,
            G=group, D=width, BLOCK_D=block_d, BM=config.block_rows, UPCAST=upcast, num_warps=4,
        )  # fmt: skip
    return out
