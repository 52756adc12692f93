"""Score blocks and keep the best of each query in one pass: no score leaves the program that made it."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import load_rows, load_tile, within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device
from kernel_index.routing.triton_topk import LOW, empty_slots, keep_best, store_ascending, with_forced


@jit
def _route_kernel(
    q_ptr, means_ptr, first_ptr, current_ptr, indices_ptr, q_b, q_t, q_h, mean_b, mean_n, mean_h, legal_b,
    T, BLOCKS, K, TOPK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G = K * GROUPS
    b, g = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    o_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    m_q = o_q < T
    current = tl.load(current_ptr + b * legal_b + o_q, mask=m_q, other=-1)  # [QUERIES]
    first = tl.load(first_ptr + b * legal_b + o_q, mask=m_q, other=0)  # [QUERIES]

    q_mean = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for h in range(0, GROUP):
        o_row = o_q.to(tl.int64) * q_t + (g * GROUP + h) * q_h
        q_mean += load_rows(q_ptr + b * q_b, o_row, m_q, D, BLOCK_D).to(tl.float32)
    q_mean = q_mean / GROUP

    kept = empty_slots(QUERIES, KEPT, TOPK)
    kept = with_forced(kept, 0, current, (current >= 0) & (current < BLOCKS), KEPT)

    low = tl.min(tl.where(current >= 0, first, LOW), 0) // BN
    high = tl.cdiv(tl.max(current, 0), BN)
    p_means = means_ptr + b * mean_b + (g // GROUPS) * mean_h
    for i in range(low, high):
        b_means = load_tile(p_means, i * BN, mean_n, BLOCKS, BN, D, BLOCK_D)  # [BN, BLOCK_D]
        o_n = i * BN + tl.arange(0, BN)  # [BN]
        score = tl.dot(q_mean, tl.trans(b_means), input_precision=PRECISION)  # [QUERIES, BN]
        m_legal = within(o_n[None, :], first[:, None], current[:, None])
        kept = keep_best(kept, score, o_n, m_legal)
    store_ascending(indices_ptr + ((b * T + o_q) * G + g) * TOPK, kept, m_q, TOPK, KEPT)


class Config(NamedTuple):
    """Queries of a program, blocks that it scores at once, precision of products, warps."""

    queries: int
    step: int
    precision: str
    num_warps: int


def pick_config(target: Target) -> Config:
    """The largest that spill no register.

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
    config = pick_config(target_of(q.device))
    if B * T:
        with on_device(q):
            _route_kernel[(ceil_div(T, config.queries), B * groups)](
                q, means, first, current, indices, *q.stride()[:3], *means.stride()[:3],
                0 if first.shape[0] == 1 else T, T, blocks, K, topk,
                D=D, BLOCK_D=dot_block(D), QUERIES=config.queries, BN=config.step,
                KEPT=next_power_of_2(topk), GROUP=H // groups, GROUPS=groups // K, PRECISION=config.precision,
                num_warps=config.num_warps, num_stages=2,
            )  # fmt: skip
    return indices
