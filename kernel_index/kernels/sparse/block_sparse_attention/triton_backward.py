"""Backward: dQ by tiles of queries over their union, dK and dV by key blocks over the queries that selected them.

No sum is made by atomics and every list has one order, so two runs give the same bits.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    dot,
    has_nan,
    load_rows,
    load_tile,
    lse_of_grad,
    score_grad,
    scores,
    store_rows,
    store_tile,
    union_visits,
    weighted_sum,
    within,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import AttentionLaunch, ceil_div, on_device, row_stride, strides
from kernel_index.kernels.sparse.block_sparse_attention.plan import KeyPlan, Plan


@jit
def _queries_step(
    dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, first, stop, m_member, is_partial, start, end, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    RAGGED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """BN keys from ``first`` on, of a block that ends before ``stop`` and that the rows ``m_member`` [BM] selected."""
    o_k = first + tl.arange(0, BN)  # [BN]
    b_k = load_tile(p_k, first, k_t, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
    p = tl.exp2(z * outer - lse_of_grad(lse, m_member)[:, None])
    m_seen = m_member[:, None] & within(o_k[None, :], start[:, None], tl.minimum(end, stop)[:, None])  # [BM, BN]
    if is_partial:
        p = tl.where(within(o_k[None, :], start[:, None], end[:, None]), p, 0.0)
    if RAGGED:
        p = tl.where((o_k < stop)[None, :], p, 0.0)
    b_v = load_tile(p_v, first, v_t, S, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    dz = score_grad(z, p, dot(b_do, tl.trans(b_v), UPCAST), delta[:, None], CAPPED)  # [BM, BN]
    return dq + weighted_sum(dz, b_k, m_seen, CAREFUL, UPCAST)


@jit
def _queries_walk(
    b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, blocks_ptr, members_ptr, begin, full_begin, full_stop, last, o_bit,
    start, end, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dQ over the slots ``begin ≤ slot < last`` of a union; ``o_bit`` [BM] are the rows' bits in it."""
    STEPS: tl.constexpr = (BLOCK + BN - 1) // BN
    RAGGED: tl.constexpr = BLOCK % BN != 0
    STAGES: tl.constexpr = 1 if CAREFUL else None
    dq = tl.zeros((BM, BLOCK_D), tl.float32)
    for i in tl.range(0, (last - begin) * STEPS, num_stages=STAGES):
        slot = begin + i // STEPS
        first_key = tl.load(blocks_ptr + slot) * BLOCK
        m_member = ((tl.load(members_ptr + slot) >> o_bit) & 1) != 0  # [BM]
        is_partial = (slot < full_begin) | (slot >= full_stop)
        dq = _queries_step(
            dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, first_key + i % STEPS * BN, first_key + BLOCK, m_member,
            is_partial, start, end, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, RAGGED, CAPPED, UPCAST, CAREFUL,
        )  # fmt: skip
    return dq


@jit
def _queries_kernel(
    d_out_ptr, d_lse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, blocks_ptr, members_ptr, sizes_ptr, start_ptr,
    end_ptr, dq_ptr, delta_ptr, do_b, do_t, do_h, dl_b, dl_h, dl_t, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    window_b, T, S, K, TILES, UNION, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, HAS_D_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of the rows of a program of the forward pass, and their ``delta`` for the keys' kernel."""
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk, group = tl.program_id(1) % CHUNKS, tl.program_id(1) // CHUNKS
    G = K * GROUPS
    H = G * GROUP
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)
    first = tile * QUERIES
    o_m = tl.arange(0, BM)  # [BM]
    o_q, o_g = first + o_m // HEADS, chunk * HEADS + o_m % HEADS  # [BM]: the row's query, and its head in the group
    m_m = (o_q < T) & (o_g < GROUP)
    o_h, token = g * GROUP + o_g, b * T + o_q

    b_do = load_rows(d_out_ptr + b * do_b, o_q.to(tl.int64) * do_t + o_h * do_h, m_m, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    b_out = load_rows(out_ptr, (token * H + o_h) * DV, m_m, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)  # [BM]
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + b * dl_b + o_h * dl_h + o_q * dl_t, mask=m_m, other=0.0)
    b_lse = tl.load(lse_ptr + token * H + o_h, mask=m_m, other=float("-inf"))  # [BM]
    delta = tl.where(b_lse == float("-inf"), 0.0, delta)
    lse = lse_of_grad(b_lse, b_lse != float("-inf"))
    tl.store(delta_ptr + token * H + o_h, delta, mask=m_m)

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
    dq = _queries_walk(
        b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, blocks_ptr, members_ptr, begin, full_begin, full_stop, stop, o_bit,
        start, end, S, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, BLOCK, CAPPED, UPCAST, False,
    )  # fmt: skip
    if has_nan(dq):
        dq = _queries_walk(
            b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, blocks_ptr, members_ptr, begin, full_begin, full_stop, stop,
            o_bit, start, end, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BM, BN, BLOCK, CAPPED, UPCAST, True,
        )  # fmt: skip
    store_rows(dq_ptr, (token * H + o_h) * D, m_m, dq * scale, D, BLOCK_D, UPCAST)


@jit
def _keys_step(
    dk, dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_list, start, end, q_t, q_h, do_t, do_h,
    first, stop, is_partial, o_h, last_head, H, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """BM rows, from slot ``first`` of a list of queries on; ``start`` and ``end`` bound the queries that see each key.

    Scores are transposed, [BN, BM], so that dK and dV are products without a transposed operand.
    """
    o_m = tl.arange(0, BM)  # [BM]
    o_slot = first + o_m // HEADS
    m_m = o_slot < stop
    if GROUP % HEADS != 0:
        m_m = m_m & (o_h < last_head)
    o_q = tl.load(p_list + o_slot, mask=m_m, other=0)  # [BM]
    token = o_q.to(tl.int64) if WIDE else o_q
    b_q = load_rows(p_q, token * q_t + o_h * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
    b_lse = tl.load(p_lse + token * H + o_h, mask=m_m, other=float("inf"))  # [BM]: no gradient where there is no row
    b_delta = tl.load(p_delta + token * H + o_h, mask=m_m, other=0.0)  # [BM]
    z = scores(b_k, b_q, inner, CAPPED, UPCAST)  # [BN, BM]
    p = tl.exp2(z * outer - b_lse[None, :])
    m_seen = m_m[None, :] & within(o_q[None, :], start[:, None], end[:, None])  # [BN, BM]
    if is_partial:
        p = tl.where(within(o_q[None, :], start[:, None], end[:, None]), p, 0.0)
    b_do = load_rows(p_do, token * do_t + o_h * do_h, m_m, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    dv += weighted_sum(p, b_do, m_seen, CAREFUL, UPCAST)
    dz = score_grad(z, p, dot(b_v, tl.trans(b_do), UPCAST), b_delta[None, :], CAPPED)  # [BN, BM]
    return dk + weighted_sum(dz, b_q, m_seen, CAREFUL, UPCAST), dv


@jit
def _keys_walk(
    b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, list_ptr, bounds_ptr, start, end, q_t, q_h, do_t, do_h, b, kv_head,
    block, K, BLOCKS, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    CAPPED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dK and dV over the lists of all groups of a KV head; pointers are to the batch row."""
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    STAGES: tl.constexpr = 1 if CAREFUL else None
    H = K * GROUPS * GROUP
    o_chunk = tl.arange(0, BM) % HEADS  # [BM]
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    for i in range(0, GROUPS * CHUNKS):
        g, o_g = kv_head * GROUPS + i // CHUNKS, i % CHUNKS * HEADS + o_chunk
        o_h, last_head = g.to(tl.int32) * GROUP + o_g, g.to(tl.int32) * GROUP + GROUP
        p_bounds = bounds_ptr + ((b * K * GROUPS + g) * BLOCKS + block) * 4
        first = tl.load(p_bounds)
        full_begin = (tl.load(p_bounds + 1) - first).to(tl.int32)
        full_stop = (tl.load(p_bounds + 2) - first).to(tl.int32)
        last = (tl.load(p_bounds + 3) - first).to(tl.int32)
        left, full = tl.cdiv(full_begin, QUERIES), tl.cdiv(full_stop - full_begin, QUERIES)
        right = tl.cdiv(last - full_stop, QUERIES)
        for j in tl.range(0, left + full + right, num_stages=STAGES):
            is_right = j >= left + full
            is_partial = (j < left) | is_right
            begin = tl.where(is_partial, 0, full_begin - left * QUERIES)
            begin = tl.where(is_right, full_stop - (left + full) * QUERIES, begin)
            stop = tl.where(is_right, last, tl.where(is_partial, full_begin, full_stop))
            dk, dv = _keys_step(
                dk, dv, b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, list_ptr + first, start, end, q_t, q_h, do_t,
                do_h, begin + j * QUERIES, stop, is_partial, o_h, last_head, H, inner, outer,
                D, DV, BLOCK_D, BLOCK_DV, BM, GROUP, HEADS, CAPPED, WIDE, UPCAST, CAREFUL,
            )  # fmt: skip
    return dk, dv


@jit
def _keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, list_ptr, bounds_ptr, start_ptr, end_ptr, dk_ptr, dv_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, T, S, K, BLOCKS, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one block of one KV head, over the lists of all its groups."""
    STEPS: tl.constexpr = (BLOCK + BN - 1) // BN
    H = K * GROUPS * GROUP
    block = tl.program_id(0) // STEPS
    first_key = block * BLOCK + tl.program_id(0) % STEPS * BN
    last_key = tl.minimum(block * BLOCK + BLOCK, S)
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    o_k = first_key + tl.arange(0, BN)  # [BN]
    start = tl.load(start_ptr + b * window_b + o_k, mask=o_k < last_key, other=0)  # [BN]
    end = tl.load(end_ptr + b * window_b + o_k, mask=o_k < last_key, other=0)  # [BN]
    b_k = load_tile(k_ptr + b * k_b + kv_head * k_h, first_key, k_t, last_key, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    b_v = load_tile(v_ptr + b * v_b + kv_head * v_h, first_key, v_t, last_key, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    q_ptr += b * q_b
    d_out_ptr += b * do_b
    lse_ptr += b * T * H
    delta_ptr += b * T * H
    dk, dv = _keys_walk(
        b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, list_ptr, bounds_ptr, start, end, q_t, q_h, do_t, do_h, b,
        kv_head, block, K, BLOCKS, inner, outer,
        D, DV, BLOCK_D, BLOCK_DV, BM, BN, QUERIES, HEADS, GROUP, GROUPS, CAPPED, WIDE, UPCAST, False,
    )  # fmt: skip
    if has_nan(dk) | has_nan(dv):
        dk, dv = _keys_walk(
            b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, list_ptr, bounds_ptr, start, end, q_t, q_h, do_t, do_h, b,
            kv_head, block, K, BLOCKS, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BM, BN, QUERIES, HEADS, GROUP, GROUPS, CAPPED, WIDE, UPCAST, True,
        )  # fmt: skip
    store_tile(dk_ptr + (b * S * K + kv_head) * D, first_key, K * D, dk * scale, last_key, BN, D, BLOCK_D, UPCAST)
    store_tile(dv_ptr + (b * S * K + kv_head) * DV, first_key, K * DV, dv, last_key, BN, DV, BLOCK_DV, UPCAST)


def backward_queries(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    bounds: tuple[Tensor, Tensor],
    launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill dQ and ``delta`` [B, T, H], what the keys' kernel subtracts from the gradient of a probability."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    G, tiles, union = plan.blocks.shape[1:]
    chunks = ceil_div(launch.constants["GROUP"], launch.constants["HEADS"])
    if B * T * H:
        with on_device(q):
            _queries_kernel[(tiles, B * G * chunks)](
                d_out, d_lse, q, k, v, out, lse, plan.blocks, plan.members, plan.sizes, *bounds, *outputs,
                *strides(d_out, d_out if d_lse is None else d_lse, q, k, v), row_stride(bounds[0]),
                T, S, K, tiles, union, launch.scale, launch.inner, launch.outer,
                HAS_D_LSE=d_lse is not None, **launch.constants,
            )  # fmt: skip
    return outputs


def backward_keys(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: KeyPlan,
    bounds: tuple[Tensor, Tensor],
    launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill dK and dV."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    blocks = plan.bounds.shape[2]
    if B * S * K:
        wide = T * max(q.stride(1), d_out.stride(1), H) >= 2**31
        steps = ceil_div(launch.constants["BLOCK"], launch.constants["BN"])
        with on_device(q):
            _keys_kernel[(blocks * steps, B * K)](
                d_out, q, k, v, lse, delta, plan.queries, plan.bounds, *bounds, *outputs,
                *strides(d_out, q, k, v), row_stride(bounds[0]), T, S, K, blocks, launch.scale, launch.inner,
                launch.outer, WIDE=wide, **launch.constants,
            )  # fmt: skip
    return outputs
