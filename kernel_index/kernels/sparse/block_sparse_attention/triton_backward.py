"""Backward: dQ by tiles of queries over their union, dK and dV by key blocks over the queries that picked them.

No sum is made by atomics and every list has one order, so two runs give the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    dot,
    load_rows,
    load_tile,
    narrow,
    store_rows,
    store_tile,
    tanh,
    union_visits,
)
from kernel_index.core.triton.launch import ceil_div, on_device
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Launch, row_stride, strides
from kernel_index.kernels.sparse.block_sparse_attention.plan import KeyPlan, Plan


@triton.jit
def _queries_step(
    dq, q, d_out, lse, delta, k_base, v_base, k_stride, v_stride, at, stop, member, partial, start, end, S, inner,
    outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    RAGGED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    key = at + tl.arange(0, BN)
    k = load_tile(k_base, at, k_stride, S, BN, D, BLOCK_D)
    z = dot(q, tl.trans(k), UPCAST)
    if CAPPED:
        z = tanh(z * inner)
    p = tl.exp2(z * outer - tl.where(member, lse, float("inf"))[:, None])
    if partial:
        p = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    if RAGGED:
        p = tl.where((key < stop)[None, :], p, 0.0)
    v = load_tile(v_base, at, v_stride, S, BN, DV, BLOCK_DV)
    dz = p * (dot(d_out, tl.trans(v), UPCAST) - delta[:, None])
    if CAPPED:
        dz = dz * (1.0 - z * z)
    return dq + dot(narrow(dz, k.dtype, UPCAST), k, UPCAST)


@triton.jit
def _queries_kernel(
    d_out_ptr, d_lse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, blocks_ptr, members_ptr, sizes_ptr, start_ptr,
    end_ptr, dq_ptr, delta_ptr, g_b, g_t, g_h, l_b, l_h, l_t, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b,
    T, S, K, TILES, PLACES, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, HAS_D_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (BLOCK + BN - 1) // BN
    RAGGED: tl.constexpr = BLOCK % BN != 0
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk, group = tl.program_id(1) % CHUNKS, tl.program_id(1) // CHUNKS
    G = K * GROUPS
    H = G * GROUP
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)
    first = tile * QUERIES
    row = tl.arange(0, BM)
    query, of_group = first + row // HEADS, chunk * HEADS + row % HEADS
    exists = (query < T) & (of_group < GROUP)
    head, token = g * GROUP + of_group, b * T + query

    d_out = load_rows(d_out_ptr + b * g_b, query.to(tl.int64) * g_t + head * g_h, exists, DV, BLOCK_DV)
    out = load_rows(out_ptr, (token * H + head) * DV, exists, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + b * l_b + head * l_h + query * l_t, mask=exists, other=0.0)
    lse = tl.load(lse_ptr + token * H + head, mask=exists, other=float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # exp2(z − ∞) = 0: what a query without keys sends back
    tl.store(delta_ptr + token * H + head, delta, mask=exists)

    start_ptr += b * interval_b
    end_ptr += b * interval_b
    start = tl.load(start_ptr + query, mask=exists, other=0)
    end = tl.load(end_ptr + query, mask=exists, other=0)
    union = (b * G + g) * TILES + tile
    blocks_ptr += union * PLACES
    members_ptr += union * PLACES
    size = tl.load(sizes_ptr + union)
    begin, whole, cease, stop = union_visits(blocks_ptr, start_ptr, end_ptr, size, first, T, QUERIES, BLOCK)

    q = load_rows(q_ptr + b * q_b, query.to(tl.int64) * q_t + head * q_h, exists, D, BLOCK_D)
    of_keys = g // GROUPS
    k_base, v_base = k_ptr + b * k_b + of_keys * k_h, v_ptr + b * v_b + of_keys * v_h
    bit = (row // HEADS).to(tl.int64)
    dq = tl.zeros((BM, BLOCK_D), tl.float32)
    for i in range(0, (stop - begin) * STEPS):
        place = begin + i // STEPS
        at = tl.load(blocks_ptr + place) * BLOCK
        member = ((tl.load(members_ptr + place) >> bit) & 1) != 0
        partial = (place < whole) | (place >= cease)
        dq = _queries_step(
            dq, q, d_out, lse, delta, k_base, v_base, k_t, v_t, at + i % STEPS * BN, at + BLOCK, member, partial,
            start, end, S, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, RAGGED, CAPPED, UPCAST,
        )  # fmt: skip
    store_rows(dq_ptr, (token * H + head) * D, exists, dq * scale, D, BLOCK_D, UPCAST)


@triton.jit
def _keys_step(
    dk, dv, k, v, q_base, d_out_base, lse_base, delta_base, list_ptr, start, end, q_t, q_h, g_t, g_h,
    first, stop, partial, head, last_head, H, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BM)
    place = first + row // HEADS
    exists = place < stop
    if GROUP % HEADS != 0:
        exists = exists & (head < last_head)
    query = tl.load(list_ptr + place, mask=exists, other=0)
    token = query.to(tl.int64) if WIDE else query
    q = load_rows(q_base, token * q_t + head * q_h, exists, D, BLOCK_D)
    lse = tl.load(lse_base + token * H + head, mask=exists, other=float("inf"))  # exp2(z − ∞) = 0
    delta = tl.load(delta_base + token * H + head, mask=exists, other=0.0)
    z = dot(k, tl.trans(q), UPCAST)  # transposed throughout: [keys, rows]
    if CAPPED:
        z = tanh(z * inner)
    p = tl.exp2(z * outer - lse[None, :])
    if partial:
        p = tl.where((query[None, :] >= start[:, None]) & (query[None, :] < end[:, None]), p, 0.0)
    d_out = load_rows(d_out_base, token * g_t + head * g_h, exists, DV, BLOCK_DV)
    dv += dot(narrow(p, d_out.dtype, UPCAST), d_out, UPCAST)
    dz = p * (dot(v, tl.trans(d_out), UPCAST) - delta[None, :])
    if CAPPED:
        dz = dz * (1.0 - z * z)
    return dk + dot(narrow(dz, q.dtype, UPCAST), q, UPCAST), dv


@triton.jit
def _keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, list_ptr, bounds_ptr, start_ptr, end_ptr, dk_ptr, dv_ptr,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b, T, S, K, BLOCKS, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (BLOCK + BN - 1) // BN
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    H = K * GROUPS * GROUP
    block = tl.program_id(0) // STEPS
    at = block * BLOCK + tl.program_id(0) % STEPS * BN
    rows = tl.minimum(block * BLOCK + BLOCK, S)
    b, own = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    key = at + tl.arange(0, BN)
    start = tl.load(start_ptr + b * interval_b + key, mask=key < rows, other=0)
    end = tl.load(end_ptr + b * interval_b + key, mask=key < rows, other=0)
    k = load_tile(k_ptr + b * k_b + own * k_h, at, k_t, rows, BN, D, BLOCK_D)
    v = load_tile(v_ptr + b * v_b + own * v_h, at, v_t, rows, BN, DV, BLOCK_DV)
    q_ptr += b * q_b
    d_out_ptr += b * g_b
    lse_ptr += b * T * H
    delta_ptr += b * T * H
    of_program = tl.arange(0, BM) % HEADS
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    for i in range(0, GROUPS * CHUNKS):
        g, of_group = own * GROUPS + i // CHUNKS, i % CHUNKS * HEADS + of_program
        head, last_head = g.to(tl.int32) * GROUP + of_group, g.to(tl.int32) * GROUP + GROUP
        bounds = bounds_ptr + ((b * K * GROUPS + g) * BLOCKS + block) * 4
        first = tl.load(bounds)
        whole, cease = (tl.load(bounds + 1) - first).to(tl.int32), (tl.load(bounds + 2) - first).to(tl.int32)
        last = (tl.load(bounds + 3) - first).to(tl.int32)
        left, full = tl.cdiv(whole, QUERIES), tl.cdiv(cease - whole, QUERIES)
        right = tl.cdiv(last - cease, QUERIES)
        for j in range(0, left + full + right):
            behind = j >= left + full
            partial = (j < left) | behind
            begin = tl.where(behind, cease - (left + full) * QUERIES, tl.where(partial, 0, whole - left * QUERIES))
            stop = tl.where(behind, last, tl.where(partial, whole, cease))
            dk, dv = _keys_step(
                dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, list_ptr + first, start, end, q_t, q_h, g_t, g_h,
                begin + j * QUERIES, stop, partial, head, last_head, H, inner, outer,
                D, DV, BLOCK_D, BLOCK_DV, BM, GROUP, HEADS, CAPPED, WIDE, UPCAST,
            )  # fmt: skip
    store_tile(dk_ptr + (b * S * K + own) * D, at, K * D, dk * scale, rows, BN, D, BLOCK_D, UPCAST)
    store_tile(dv_ptr + (b * S * K + own) * DV, at, K * DV, dv, rows, BN, DV, BLOCK_DV, UPCAST)


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
    how: Launch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill dQ and ``delta`` [B, T, H], what the keys' kernel subtracts from the gradient of a probability."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    G, tiles, places = plan.blocks.shape[1:]
    if B * T * H:
        with on_device(q):
            _queries_kernel[(tiles, B * G * how.chunks)](
                d_out, d_lse, q, k, v, out, lse, plan.blocks, plan.members, plan.sizes, *bounds, *outputs,
                *strides(d_out, d_out if d_lse is None else d_lse, q, k, v), row_stride(bounds[0]),
                T, S, K, tiles, places, how.scale, how.inner, how.outer,
                HAS_D_LSE=d_lse is not None, **how.constants,
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
    how: Launch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill dK and dV."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    blocks = plan.bounds.shape[2]
    if B * S * K:
        wide = T * max(q.stride(1), d_out.stride(1), H) >= 2**31
        steps = ceil_div(how.constants["BLOCK"], how.constants["BN"])
        with on_device(q):
            _keys_kernel[(blocks * steps, B * K)](
                d_out, q, k, v, lse, delta, plan.queries, plan.bounds, *bounds, *outputs,
                *strides(d_out, q, k, v), row_stride(bounds[0]), T, S, K, blocks, how.scale, how.inner,
                how.outer, WIDE=wide, **how.constants,
            )  # fmt: skip
    return outputs
