"""Both steps in one program: the best groups of blocks, then the best of their children; no score is stored.

Scores are computed twice, once for the groups and once for their children: the same operations, so the same bits, and a
group is among the best ones if it is not below the last of them.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import load_rows, within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device
from kernel_index.routing.triton_topk import LOW, empty_slots, keep_best, ordered, store_ascending, with_forced


@jit
def _score_tile(
    q_mean, p_keys, key_n, first_group, first, current, N, RATIO,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHILDREN: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of GROUPS groups of CHILDREN ≥ RATIO blocks: the blocks [N'], their scores and which are legal [QUERIES, N'].

    And the mean score of the legal children of each group, and how many these are, [QUERIES, GROUPS].
    """
    o_i = tl.arange(0, GROUPS * CHILDREN)  # [N']
    o_n = (first_group + o_i // CHILDREN) * RATIO + o_i % CHILDREN
    m_n = (o_i % CHILDREN < RATIO) & (o_n < N)
    b_keys = load_rows(p_keys, o_n.to(tl.int64) * key_n, m_n, D, BLOCK_D).to(tl.float32)  # [N', BLOCK_D]
    score = tl.dot(q_mean, tl.trans(b_keys), input_precision=PRECISION)  # [QUERIES, N']
    m_legal = within(o_n[None, :], first[:, None], current[:, None]) & m_n[None, :]
    by_group = tl.reshape(tl.where(m_legal, score, 0.0), (score.shape[0], GROUPS, CHILDREN))
    count = tl.sum(tl.reshape(m_legal.to(tl.int32), (score.shape[0], GROUPS, CHILDREN)), 2)
    mean = tl.sum(by_group, 2) / tl.maximum(count, 1).to(tl.float32)
    return o_n, score, m_legal, mean, count


@jit
def _hierarchy_kernel(
    q_ptr, keys_ptr, first_ptr, current_ptr, forced_ptr, indices_ptr, q_b, q_t, q_h, key_b, key_n, key_h, legal_b,
    T, N, K, TOPK, TOPC, RATIO,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, GROUPS: tl.constexpr, CHILDREN: tl.constexpr,
    KEPT: tl.constexpr, OPEN: tl.constexpr, GROUP: tl.constexpr, FORCED: tl.constexpr, EXHAUSTIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The selection of QUERIES queries for one KV head and the mean of its GROUP query heads."""
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    o_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    m_q = o_q < T
    current = tl.load(current_ptr + b * legal_b + o_q, mask=m_q, other=-1)  # [QUERIES]
    first = tl.load(first_ptr + b * legal_b + o_q, mask=m_q, other=0)  # [QUERIES]
    q_mean = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for h in range(0, GROUP):
        o_row = o_q.to(tl.int64) * q_t + (kv_head * GROUP + h) * q_h
        q_mean += load_rows(q_ptr + b * q_b, o_row, m_q, D, BLOCK_D).to(tl.float32)
    q_mean = q_mean / GROUP

    low = tl.min(tl.where(current >= 0, first, LOW), 0) // RATIO // GROUPS
    high = tl.cdiv(tl.cdiv(tl.max(current, 0), RATIO), GROUPS)
    p_keys = keys_ptr + b * key_b + kv_head * key_h
    last = tl.zeros((QUERIES,), tl.int64) - 2**62
    if not EXHAUSTIVE:
        opened = empty_slots(QUERIES, OPEN, TOPC)
        for i in range(low, high):
            _, _, _, mean, count = _score_tile(
                q_mean, p_keys, key_n, i * GROUPS, first, current, N, RATIO,
                D, BLOCK_D, CHILDREN, GROUPS, PRECISION,
            )  # fmt: skip
            opened = keep_best(opened, mean, i * GROUPS + tl.arange(0, GROUPS), count > 0)
        last = tl.min(opened, 1)  # [QUERIES]

    kept = empty_slots(QUERIES, KEPT, TOPK)
    p_forced = forced_ptr + (b * legal_b + o_q) * FORCED
    for f in tl.static_range(FORCED):
        forced = tl.load(p_forced + f, mask=m_q, other=-1)  # [QUERIES]
        kept = with_forced(kept, f, forced, forced >= 0, KEPT)
    for i in range(low, high):
        o_n, score, m_legal, mean, _ = _score_tile(
            q_mean, p_keys, key_n, i * GROUPS, first, current, N, RATIO, D, BLOCK_D, CHILDREN, GROUPS, PRECISION
        )
        if not EXHAUSTIVE:
            o_group = i * GROUPS + tl.arange(0, GROUPS)
            m_open = ordered(mean, o_group[None, :]) >= last[:, None]  # [QUERIES, GROUPS]
            m_open = tl.broadcast_to(m_open[:, :, None], (QUERIES, GROUPS, CHILDREN))
            m_legal = m_legal & tl.reshape(m_open, (QUERIES, GROUPS * CHILDREN))
        for f in tl.static_range(FORCED):
            forced = tl.load(p_forced + f, mask=m_q, other=-1)  # [QUERIES]
            m_legal = m_legal & (o_n[None, :] != forced[:, None])
        kept = keep_best(kept, score, o_n, m_legal)
    store_ascending(indices_ptr + ((b * T + o_q) * K + kv_head) * TOPK, kept, m_q, TOPK, KEPT)


class Config(NamedTuple):
    """Queries of a program, blocks that it scores at once, precision of products, warps."""

    queries: int
    step: int
    precision: str
    num_warps: int


def pick_config(target: Target) -> Config:
    if interpreting():
        return Config(16, 16, "ieee", 4)
    return Config(32, 64, "tf32x3", 8) if target.arch in (90, 100) else Config(32, 32, "ieee", 4)


def select(
    q: Tensor, keys: Tensor, sight: tuple[Tensor, Tensor, Tensor], plan: tuple[int, int, bool], indices: Tensor
) -> Tensor:
    """Fill ``indices`` int32 [B, T, K, topk].

    ``sight``: first and current [rows, T], forced [rows, T, 1, F]; ``plan``: ratio, groups to expand, whether all are.
    """
    (B, T, H, D), (N, K), topk = q.shape, keys.shape[1:3], indices.shape[3]
    (first, current, forced), (ratio, topc, exhaustive) = sight, plan
    ratio = 1 if exhaustive else ratio  # any size of groups does
    config, children = pick_config(target_of(q.device)), next_power_of_2(ratio)
    if B * T:
        with on_device(q):
            _hierarchy_kernel[(ceil_div(T, config.queries), B * K)](
                q, keys, first, current, forced, indices, *q.stride()[:3], *keys.stride()[:3],
                0 if first.shape[0] == 1 else T, T, N, K, topk, topc, ratio,
                D=D, BLOCK_D=dot_block(D), QUERIES=config.queries, GROUPS=max(1, config.step // children),
                CHILDREN=children, KEPT=next_power_of_2(topk),
                OPEN=next_power_of_2(topc), GROUP=H // K, FORCED=forced.shape[3], EXHAUSTIVE=exhaustive,
                PRECISION=config.precision, num_warps=config.num_warps, num_stages=2,
            )  # fmt: skip
    return indices
