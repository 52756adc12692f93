"""Weigh blocks and keep the best of each query in one pass: no weight leaves the program that made it."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import LOG2E, load_rows, load_tile, within
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device
from kernel_index.routing.triton_topk import LOW, empty_slots, keep_best, store_ascending, with_forced


@jit
def _importance_kernel(
    q_ptr, keys_ptr, lse_ptr, first_ptr, current_ptr, forced_ptr, indices_ptr, q_b, q_t, q_h, key_b, key_n, key_h,
    legal_b, T, N, K, G, TOPK, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, BN: tl.constexpr,
    KEPT: tl.constexpr, FORCED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The selection of QUERIES queries for one KV head; their G heads are rows ``head · QUERIES + query`` of a tile."""
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    o_q = first_query + tl.arange(0, QUERIES)  # [QUERIES]
    m_q = o_q < T
    current = tl.load(current_ptr + b * legal_b + o_q, mask=m_q, other=-1)  # [QUERIES]
    first = tl.load(first_ptr + b * legal_b + o_q, mask=m_q, other=0)  # [QUERIES]

    o_m = tl.arange(0, HEADS * QUERIES)  # [BM]
    o_t, o_h = first_query + o_m % QUERIES, o_m // QUERIES
    m_m = (o_t < T) & (o_h < G)
    o_h = (kv_head * G + o_h).to(tl.int64)
    b_q = load_rows(q_ptr + b * q_b, o_t.to(tl.int64) * q_t + o_h * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
    b_lse = tl.load(lse_ptr + (b * K * G + o_h) * T + o_t, mask=m_m, other=float("inf"))  # [BM]
    b_lse = b_lse * LOG2E

    kept = empty_slots(QUERIES, KEPT, TOPK)
    p_forced = forced_ptr + (b * legal_b + o_q) * FORCED
    for i in tl.static_range(FORCED):
        forced = tl.load(p_forced + i, mask=m_q, other=-1)  # [QUERIES]
        kept = with_forced(kept, i, forced, forced >= 0, KEPT)

    low = tl.min(tl.where(current >= 0, first, LOW), 0) // BN
    high = tl.cdiv(tl.minimum(tl.max(current, 0), N), BN)
    p_keys = keys_ptr + b * key_b + kv_head * key_h
    for i in range(low, high):
        b_keys = load_tile(p_keys, i * BN, key_n, N, BN, D, BLOCK_D)  # [BN, BLOCK_D]
        o_n = i * BN + tl.arange(0, BN)  # [BN]
        if UPCAST:
            z = tl.dot(b_q.to(tl.float32), tl.trans(b_keys.to(tl.float32)), input_precision="ieee")
        else:
            z = tl.dot(b_q, tl.trans(b_keys), input_precision="ieee")  # [BM, BN]
        weight = tl.exp2(z * (scale * LOG2E) - b_lse[:, None])
        importance = tl.sum(tl.reshape(weight, (HEADS, QUERIES, BN)), 0)  # [QUERIES, BN]
        m_legal = within(o_n[None, :], first[:, None], current[:, None]) & (o_n < N)[None, :]
        for f in tl.static_range(FORCED):
            forced = tl.load(p_forced + f, mask=m_q, other=-1)  # [QUERIES]
            m_legal = m_legal & (o_n[None, :] != forced[:, None])
        kept = keep_best(kept, importance, o_n, m_legal)
    store_ascending(indices_ptr + ((b * T + o_q) * K + kv_head) * TOPK, kept, m_q, TOPK, KEPT)


class Config(NamedTuple):
    """Rows of a tile (heads · queries), blocks that a program weighs at once, warps."""

    rows: int
    step: int
    num_warps: int


def pick_config(width: int, element_bytes: int) -> Config:
    if interpreting():
        return Config(16, 16, 4)
    if element_bytes == 4:
        return Config(64, 32, 4)
    return Config(128, 64, 4) if width <= 128 else Config(64, 64, 4)


def route(
    q: Tensor, keys: Tensor, lse: Tensor, sight: tuple[Tensor, Tensor, Tensor], scale: float, indices: Tensor
) -> Tensor:
    """Fill ``indices`` int32 [B, T, K, topk]; ``sight`` is first and current [rows, T] and forced [rows, T, 1, F]."""
    (B, T, H, D), (N, K) = q.shape, keys.shape[1:3]
    (first, current, forced), topk = sight, indices.shape[3]
    config, heads = pick_config(D, q.element_size()), next_power_of_2(H // K)
    queries = max(1, config.rows // heads)
    if B * T:
        with on_device(q):
            _importance_kernel[(ceil_div(T, queries), B * K)](
                q, keys, lse, first, current, forced, indices, *q.stride()[:3], *keys.stride()[:3],
                0 if first.shape[0] == 1 else T, T, N, K, H // K, topk, scale,
                D=D, BLOCK_D=dot_block(D), QUERIES=queries, HEADS=heads, BN=config.step, KEPT=next_power_of_2(topk),
                FORCED=forced.shape[3], UPCAST=interpreting(), num_warps=config.num_warps, num_stages=2,
            )  # fmt: skip
    return indices
