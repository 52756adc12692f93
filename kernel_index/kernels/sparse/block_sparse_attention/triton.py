"""Forward: a tile of queries, with the heads that share their selected blocks, goes over the union of these blocks.

A program reads each block of its union once, for all its rows; a row uses it if its query selected it and the token
mask allows the keys.  Blocks that are inside the window of all of the tile's queries need no token mask.  Names and
units are those of ``core/triton/attention.py``; a row of a tile is one query with one head of the group.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    has_nan,
    load_rows,
    load_tile,
    online_softmax,
    scores,
    softmax_output,
    store_rows,
    union_visits,
    weighted_sum,
    within,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import AttentionLaunch, ceil_div, on_device, row_stride, strides
from kernel_index.kernels.sparse.block_sparse_attention.plan import Plan


@jit
def _step(
    acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, first, stop, m_member, is_partial, start, end, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    RAGGED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """BN keys from ``first`` on, of a block that ends before ``stop`` and that the rows ``m_member`` [BM] selected."""
    o_k = first + tl.arange(0, BN)  # [BN]
    b_k = load_tile(p_k, first, k_t, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
    m_seen = m_member[:, None] & within(o_k[None, :], start[:, None], tl.minimum(end, stop)[:, None])  # [BM, BN]
    if CAREFUL:  # −∞ does not hide a score of NaN or +∞
        logits = tl.where(m_seen, z * outer, float("-inf"))
    else:
        logits = z * outer + tl.where(m_member, 0.0, float("-inf"))[:, None]
    if is_partial:
        logits = tl.where(within(o_k[None, :], start[:, None], end[:, None]), logits, float("-inf"))
    if RAGGED:
        logits = tl.where((o_k < stop)[None, :], logits, float("-inf"))
    p, alpha, row_max, row_sum = online_softmax(logits, row_max, row_sum)
    b_v = load_tile(p_v, first, v_t, S, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    return acc * alpha[:, None] + weighted_sum(p, b_v, m_seen, CAREFUL, UPCAST), row_max, row_sum


@jit
def _walk(
    b_q, p_k, p_v, k_t, v_t, blocks_ptr, members_ptr, begin, full_begin, full_stop, last, o_bit, start, end, S,
    inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The softmax state over the slots ``begin ≤ slot < last`` of a union; ``o_bit`` [BM] are the rows' bits in it."""
    STEPS: tl.constexpr = (BLOCK + BN - 1) // BN
    RAGGED: tl.constexpr = BLOCK % BN != 0
    STAGES: tl.constexpr = 1 if CAREFUL else None
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    for i in tl.range(0, (last - begin) * STEPS, num_stages=STAGES):
        slot = begin + i // STEPS
        first_key = tl.load(blocks_ptr + slot) * BLOCK
        m_member = ((tl.load(members_ptr + slot) >> o_bit) & 1) != 0  # [BM]
        is_partial = (slot < full_begin) | (slot >= full_stop)
        acc, row_max, row_sum = _step(
            acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, first_key + i % STEPS * BN, first_key + BLOCK, m_member,
            is_partial, start, end, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, RAGGED, CAPPED, UPCAST, CAREFUL,
        )  # fmt: skip
    return acc, row_max, row_sum


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, blocks_ptr, members_ptr, sizes_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, T, S, K, TILES, UNION, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """QUERIES queries and HEADS heads of a group of GROUP; a KV head has GROUPS groups, a union UNION slots."""
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the long unions of a causal mask begin first
    chunk, group = tl.program_id(1) % CHUNKS, tl.program_id(1) // CHUNKS
    G = K * GROUPS
    H = G * GROUP
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)
    first = tile * QUERIES
    o_m = tl.arange(0, BM)  # [BM]
    o_q, o_g = first + o_m // HEADS, chunk * HEADS + o_m % HEADS  # [BM]: the row's query, and its head in the group
    m_m = (o_q < T) & (o_g < GROUP)
    o_h = g * GROUP + o_g

    start_ptr += b * window_b
    end_ptr += b * window_b
    start = tl.load(start_ptr + o_q, mask=m_m, other=0)  # [BM]
    end = tl.load(end_ptr + o_q, mask=m_m, other=0)  # [BM]
    union = (b * G + g) * TILES + tile
    blocks_ptr += union * UNION
    members_ptr += union * UNION
    size = tl.load(sizes_ptr + union)
    if size < 0:  # lists take this tile
        return
    begin, full_begin, full_stop, stop = union_visits(blocks_ptr, start_ptr, end_ptr, size, first, T, QUERIES, BLOCK)

    b_q = load_rows(q_ptr + b * q_b, o_q.to(tl.int64) * q_t + o_h * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
    kv_head = g // GROUPS
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    o_bit = (o_m // HEADS).to(tl.int64)
    acc, row_max, row_sum = _walk(
        b_q, p_k, p_v, k_t, v_t, blocks_ptr, members_ptr, begin, full_begin, full_stop, stop, o_bit, start, end, S,
        inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, BLOCK, CAPPED, UPCAST, False,
    )  # fmt: skip
    if has_nan(acc):
        acc, row_max, row_sum = _walk(
            b_q, p_k, p_v, k_t, v_t, blocks_ptr, members_ptr, begin, full_begin, full_stop, stop, o_bit, start, end,
            S, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, BLOCK, CAPPED, UPCAST, True,
        )  # fmt: skip
    out, lse = softmax_output(acc, row_max, row_sum, row_sum == 0.0)
    token = b * T + o_q
    store_rows(out_ptr, (token * H + o_h) * DV, m_m, out, DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + token * H + o_h, lse, mask=m_m)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    bounds: tuple[Tensor, Tensor],
    launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill ``out`` [B, T, H, Dv] and the log-sum-exp, base 2, [B, T, H]."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    G, tiles, union = plan.blocks.shape[1:]
    chunks = ceil_div(launch.constants["GROUP"], launch.constants["HEADS"])
    if B * T * H:
        with on_device(q):
            _forward_kernel[(tiles, B * G * chunks)](
                q, k, v, plan.blocks, plan.members, plan.sizes, *bounds, *outputs, *strides(q, k, v),
                row_stride(bounds[0]), T, S, K, tiles, union, launch.inner, launch.outer, **launch.constants,
            )  # fmt: skip
    return outputs
