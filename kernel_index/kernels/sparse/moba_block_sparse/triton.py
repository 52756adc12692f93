"""Decoding over picked blocks: a query's picks are split among programs, then the parts are joined in a fixed order.

The query heads that share a selection are the rows of a program's tile, and only its picks are read, through the page
table where there is one.  Exponentials are base 2; ``outer`` carries log2(e).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import dot, narrow, tanh
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2, on_device, processors
from kernel_index.core.triton.splits import join_kernel

LOG2E = 1.4426950408889634


@triton.jit
def _picked_kernel(
    q_ptr, k_ptr, v_ptr, picks_ptr, start_ptr, position_ptr, table_ptr, acc_ptr, max_ptr, sum_ptr,
    k_outer, k_inner, k_h, v_outer, v_inner, v_h, table_b, table_s,
    QUERIES, GROUPS, PICKS, PER_SPLIT, BLOCK, inner, outer,
    PER_KEY_HEAD: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)  # a pair is a query and a group
    query = pair // GROUPS
    b, h = query // QUERIES, (pair % GROUPS) // PER_KEY_HEAD
    row, column = tl.arange(0, BM), tl.arange(0, BLOCK_D)
    inside = (row < J)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + (pair * J + row)[:, None] * D + column[None, :], mask=inside, other=0.0)
    start, position = tl.load(start_ptr + query), tl.load(position_ptr + query)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    first = split * PER_SPLIT
    for i in range(first, tl.minimum(first + PER_SPLIT, PICKS)):
        block = tl.load(picks_ptr + pair * PICKS + i).to(tl.int64)
        for at in range(0, BLOCK, BN):
            offset = at + tl.arange(0, BN)
            key = block * BLOCK + offset
            seen = (block >= 0) & (offset < BLOCK) & (key >= start) & (key <= position)  # nothing else is read
            if PAGED:
                outer_at = tl.load(table_ptr + b * table_b + (key // PAGE) * table_s, mask=seen, other=0).to(tl.int64)
                place = key % PAGE
            else:
                outer_at = tl.zeros_like(key) + b
                place = key
            exists = seen[:, None] & (column < D)[None, :]
            k_at = k_ptr + (outer_at * k_outer + place * k_inner + h * k_h)[:, None] + column[None, :]
            v_at = v_ptr + (outer_at * v_outer + place * v_inner + h * v_h)[:, None] + column[None, :]
            z = dot(q, tl.trans(tl.load(k_at, mask=exists, other=0.0)), UPCAST)
            if CAPPED:
                z = tanh(z * inner)
            z = tl.where(seen[None, :], z * outer, float("-inf"))
            new_m = tl.maximum(m, tl.max(z, 1))
            safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
            p = tl.exp2(z - safe_m[:, None])
            shrink = tl.exp2(m - safe_m)
            v = tl.load(v_at, mask=exists, other=0.0)
            acc = acc * shrink[:, None] + dot(narrow(p, v.dtype, UPCAST), v, UPCAST)
            sums = sums * shrink + tl.sum(p, 1)
            m = new_m
    place_of = (split.to(tl.int64) * tl.num_programs(1) + pair) * J + row
    tl.store(max_ptr + place_of, m, mask=row < J)
    tl.store(sum_ptr + place_of, sums, mask=row < J)
    tl.store(acc_ptr + place_of[:, None] * D + column[None, :], acc, mask=inside)


class Config(NamedTuple):
    """Heads of a tile, keys of a step, picks of a split."""

    block_rows: int
    block_keys: int
    picks: int


def pick_config(pairs: int, heads: int, picks: int, block_size: int, width: int, programs: int) -> Config:
    """As few splits as keep ``programs`` busy twice over; a function of sizes alone."""
    block_keys = min(64 if width <= 128 else 32, max(16, next_power_of_2(block_size)))
    splits = max(1, min(picks, ceil_div(2 * programs, max(1, pairs))))
    return Config(max(16, next_power_of_2(heads)), block_keys, ceil_div(picks, splits))


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    picks: Tensor,
    start: Tensor,
    position: Tensor,
    table: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    """Fill ``out`` [B, Lq, H, D]; ``picks`` int32 [B, Lq, G, n] with −1 for none."""
    (batch, queries, heads, width), (groups, count) = q.shape, picks.shape[2:]
    if out.numel() == 0:
        return out
    pairs, each = batch * queries * groups, heads // groups
    config = pick_config(pairs, each, count, block_size, width, processors(q))
    splits = ceil_div(count, config.picks)
    acc = torch.empty((splits, pairs, each, width), dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty((2, splits, pairs, each), dtype=torch.float32, device=q.device)
    inner, outer = (scale / softcap, softcap * LOG2E) if softcap else (1.0, scale * LOG2E)
    block_d, upcast = max(16, next_power_of_2(width)), interpreting()
    table_strides = (0, 0) if table is None else table.stride()
    with on_device(q):
        _picked_kernel[(splits, pairs)](
            q, k_cache, v_cache, picks, start, position, start if table is None else table, acc, maxima, sums,
            *k_cache.stride()[:3], *v_cache.stride()[:3], *table_strides,
            queries, groups, count, config.picks, block_size, inner, outer,
            PER_KEY_HEAD=groups // k_cache.shape[2], J=each, D=width, BLOCK_D=block_d, BM=config.block_rows,
            BN=config.block_keys, PAGE=k_cache.shape[1], PAGED=table is not None, CAPPED=softcap > 0, UPCAST=upcast,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        join_kernel[(pairs, 1)](
            acc, maxima, sums, out, each, 1, groups, splits, pairs * each,
            G=each, D=width, BLOCK_D=block_d, BM=config.block_rows, UPCAST=upcast, num_warps=4,
        )  # fmt: skip
    return out
