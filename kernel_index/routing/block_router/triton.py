"""Score blocks and keep the best of each query in one pass: no score leaves the program that made it.

A score and its block are one integer, ordered as ``routing.top_blocks`` orders them: by score, then by smaller block.
All are different, so the kept ones need no order of their own until they are written.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import load_rows, load_tile
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2, on_device

LOW = tl.constexpr(0x7FFFFFFF)
FULL = tl.constexpr(3 * 2**61)  # above every score, as −FULL is below every one


@triton.jit
def _ordered(score, block):
    """Two's complement turns float32 into an integer of its order once the bits of negative numbers are flipped."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & LOW)
    return (rank.to(tl.int64) << 31) + (block ^ LOW)


@triton.jit
def _route_kernel(
    q_ptr, means_ptr, first_ptr, current_ptr, indices_ptr, q_b, q_t, q_h, m_b, m_n, m_h, legal_b, T, BLOCKS, K, TOPK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G = K * GROUPS
    b, g = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES + tl.arange(0, QUERIES)
    exists = query < T
    current = tl.load(current_ptr + b * legal_b + query, mask=exists, other=-1)
    first = tl.load(first_ptr + b * legal_b + query, mask=exists, other=0)

    q = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for h in range(0, GROUP):
        at = query.to(tl.int64) * q_t + (g * GROUP + h) * q_h
        q += load_rows(q_ptr + b * q_b, at, exists, D, BLOCK_D).to(tl.float32)
    q = q / GROUP

    # Places behind TOPK are full from the start; the block that holds the query is above every score.
    place = tl.arange(0, KEPT)[None, :]
    full, nothing = tl.full((QUERIES, KEPT), FULL, tl.int64), tl.full((QUERIES, BN), -FULL, tl.int64)
    kept = tl.where(place < TOPK, place - full, full)
    forced = (tl.full((QUERIES,), 1, tl.int64) << 62) + (current ^ LOW)
    some = (current >= 0) & (current < BLOCKS)
    kept = tl.where((place == 0) & some[:, None], forced[:, None], kept)

    low = tl.min(tl.where(current >= 0, first, LOW), 0) // BN
    high = tl.cdiv(tl.max(current, 0), BN)
    base = means_ptr + b * m_b + (g // GROUPS) * m_h
    for i in range(low, high):
        means = load_tile(base, i * BN, m_n, BLOCKS, BN, D, BLOCK_D)
        block = i * BN + tl.arange(0, BN)
        score = tl.dot(q, tl.trans(means), input_precision=PRECISION)
        routable = (block[None, :] >= first[:, None]) & (block[None, :] < current[:, None])
        found = tl.where(routable, _ordered(score, block[None, :]), nothing)
        best, worst = tl.max(found, 1), tl.min(kept, 1)
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            kept = tl.where((kept == worst[:, None]) & (best > worst)[:, None], best[:, None], kept)
            found = tl.where(found == best[:, None], nothing, found)
            best, worst = tl.max(found, 1), tl.min(kept, 1)

    block = tl.where(kept >= KEPT - FULL, ((kept & LOW) ^ LOW).to(tl.int32), LOW)
    block = tl.where(place < TOPK, block, LOW)
    row = indices_ptr + ((b * T + query) * G + g) * TOPK
    for i in range(0, TOPK):  # ascending, what is none last
        least = tl.min(block, 1)
        tl.store(row + i, tl.where(least < LOW, least, -1), mask=exists)
        block = tl.where(block == least[:, None], LOW, block)


class Config(NamedTuple):
    """Queries of a program, blocks of a step, how products are made, warps."""

    queries: int
    step: int
    precision: str
    num_warps: int


def pick_config(target: Target) -> Config:
    """The largest that spill no register; compiled ahead of time, not timed.

    Three products of TF32 halves err by about 2⁻²², as float32 sums of this length do.
    """
    if interpreting():
        return Config(16, 16, "ieee", 4)
    if target.kind == "hip":
        return Config(64, 64, "ieee", 8)
    if target.arch in (90, 100):
        return Config(64, 64, "tf32x3", 4 if target.arch == 90 else 8)
    return Config(32, 32, "ieee", 4)


def route(q: Tensor, means: Tensor, first: Tensor, current: Tensor, groups: int, indices: Tensor) -> Tensor:
    """Fill ``indices`` int32 [B, T, G, topk]."""
    (B, T, H, D), (blocks, K) = q.shape, means.shape[1:3]
    topk = indices.shape[3]
    how = pick_config(target_of(q.device))
    if B * T:
        with on_device(q):
            _route_kernel[(ceil_div(T, how.queries), B * groups)](
                q, means, first, current, indices, *q.stride()[:3], *means.stride()[:3],
                0 if first.shape[0] == 1 else T, T, blocks, K, topk,
                D=D, BLOCK_D=max(16, next_power_of_2(D)), QUERIES=how.queries, BN=how.step,
                KEPT=next_power_of_2(topk), GROUP=H // groups, GROUPS=groups // K, PRECISION=how.precision,
                num_warps=how.num_warps, num_stages=2,
            )  # fmt: skip
    return indices
