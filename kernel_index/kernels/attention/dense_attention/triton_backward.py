"""The backward pass of attention by windows: see ``triton.py``."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    dot,
    full_tile,
    has_nan,
    listed_tiles,
    load_tile,
    lse_of_grad,
    masked_tile,
    score_grad,
    scores,
    store_tile,
    weighted_sum,
    window_tiles,
    within,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, on_device, row_stride, strides
from kernel_index.kernels.attention.dense_attention.geometry import Paths, arguments_of, launch_of


@jit
def _queries_step(
    dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, first, o_q, start, end, q_end_ptr, S, inner,
    outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    o_k = first + tl.arange(0, BN)  # [BN]
    b_k = load_tile(p_k, first, k_t, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
    p = tl.exp2(z * outer - lse[:, None])
    m_seen = within(o_k[None, :], start[:, None], end[:, None])  # [BM, BN]
    if LISTED and MASKED:
        m_seen = m_seen & (o_q[:, None] < tl.load(q_end_ptr + o_k, mask=o_k < S, other=0)[None, :])
    if MASKED:
        p = tl.where(m_seen, p, 0.0)
    b_v = load_tile(p_v, first, v_t, S, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    dz = score_grad(z, p, dot(b_do, tl.trans(b_v), UPCAST), delta[:, None], CAPPED)  # [BM, BN]
    return dq + weighted_sum(dz, b_k, m_seen, MASKED and CAREFUL, UPCAST)


@jit
def _queries_walk(
    b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, low, left, full, right, o_q, start, end, q_end_ptr, list_ptr,
    tiles, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    STAGES: tl.constexpr = 1 if CAREFUL else None
    dq = tl.zeros((BM, BLOCK_D), tl.float32)
    for i in tl.range(0, full, num_stages=STAGES):
        first_key = full_tile(i, low, left, list_ptr, BN, LISTED)
        dq = _queries_step(
            dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, first_key, o_q, start, end, q_end_ptr, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, False, CAREFUL, LISTED,
        )  # fmt: skip
    for i in tl.range(0, left + right, num_stages=STAGES):
        first_key = masked_tile(i, low, left, full, list_ptr, tiles, BN, LISTED)
        dq = _queries_step(
            dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, first_key, o_q, start, end, q_end_ptr, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, True, CAREFUL, LISTED,
        )  # fmt: skip
    return dq


@jit
def _queries_kernel(
    d_out_ptr, d_lse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, end_ptr, q_end_ptr, list_ptr, dq_ptr,
    delta_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, q_end_b, list_b, tiles, T, S, H, G,
    scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, HAS_D_LSE: tl.constexpr, UPCAST: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, and its ``delta`` for the keys' kernel."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    start_ptr += b * window_b
    end_ptr += b * window_b
    o_q = first + tl.arange(0, BM)  # [BM]
    start = tl.load(start_ptr + o_q, mask=o_q < T, other=0)  # [BM]
    end = tl.load(end_ptr + o_q, mask=o_q < T, other=0)  # [BM]
    if LISTED:
        q_end_ptr += b * q_end_b
        list_ptr += b * list_b + (first // BM) * (2 + 2 * tiles)
        low, left, full, right = listed_tiles(list_ptr)
    else:
        low, left, full, right = window_tiles(start_ptr, end_ptr, first, T, BM, BN)
    b_do = load_tile(d_out_ptr + b * do_b + h * do_h, first, do_t, T, BM, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    b_out = load_tile(out_ptr + (b * T * H + h) * DV, first, H * DV, T, BM, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)  # [BM]
    o_row = (b * H + h) * T + o_q  # [BM]
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + o_row, mask=o_q < T, other=0.0)
    m_some = start < end  # [BM]
    delta = tl.where(m_some, delta, 0.0)
    tl.store(delta_ptr + o_row, delta, mask=o_q < T)
    lse = lse_of_grad(tl.load(lse_ptr + o_row, mask=o_q < T, other=0.0), m_some)  # [BM]
    b_q = load_tile(q_ptr + b * q_b + h * q_h, first, q_t, T, BM, D, BLOCK_D)  # [BM, BLOCK_D]
    kv_head = h // G
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    dq = _queries_walk(
        b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, low, left, full, right, o_q, start, end, q_end_ptr, list_ptr, tiles,
        S, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, CAPPED, UPCAST, False, LISTED,
    )  # fmt: skip
    if has_nan(dq):
        dq = _queries_walk(
            b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, low, left, full, right, o_q, start, end, q_end_ptr, list_ptr,
            tiles, S, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, CAPPED, UPCAST, True, LISTED,
        )  # fmt: skip
    store_tile(dq_ptr + (b * T * H + h) * D, first, H * D, dq * scale, T, BM, D, BLOCK_D, UPCAST)


@jit
def _keys_step(
    dk, dv, b_k, b_v, p_q, p_do, p_lse, p_delta, q_t, do_t, first, o_k, start, end, k_start_ptr,
    k_end_ptr, T, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Scores are transposed, [BN, BM], so that dK and dV are products without a transposed operand."""
    o_q = first + tl.arange(0, BM)  # [BM]
    b_q = load_tile(p_q, first, q_t, T, BM, D, BLOCK_D)  # [BM, BLOCK_D]
    b_lse = tl.load(p_lse + o_q, mask=o_q < T, other=0.0)  # [BM]
    b_delta = tl.load(p_delta + o_q, mask=o_q < T, other=0.0)  # [BM]
    z = scores(b_k, b_q, inner, CAPPED, UPCAST)  # [BN, BM]
    p = tl.exp2(z * outer - b_lse[None, :])
    m_seen = within(o_q[None, :], start[:, None], end[:, None])  # [BN, BM]
    if LISTED and MASKED:
        b_start = tl.load(k_start_ptr + o_q, mask=o_q < T, other=0)  # [BM]
        b_end = tl.load(k_end_ptr + o_q, mask=o_q < T, other=0)  # [BM]
        m_seen = m_seen & within(o_k[:, None], b_start[None, :], b_end[None, :])
    if MASKED:
        p = tl.where(m_seen, p, 0.0)
    b_do = load_tile(p_do, first, do_t, T, BM, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    dv += weighted_sum(p, b_do, m_seen, MASKED and CAREFUL, UPCAST)
    dz = score_grad(z, p, dot(b_v, tl.trans(b_do), UPCAST), b_delta[None, :], CAPPED)  # [BN, BM]
    return dk + weighted_sum(dz, b_q, m_seen, MASKED and CAREFUL, UPCAST), dv


@jit
def _keys_walk(
    b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, q_t, q_h, do_t, do_h, low, left, full, right, o_k, start, end,
    k_start_ptr, k_end_ptr, list_ptr, tiles, T, G, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Over the queries of the G heads of a group; pointers are to its first head."""
    STAGES: tl.constexpr = 1 if CAREFUL else None
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    for g in range(0, G):
        h = tl.cast(g, tl.int64)
        p_q, p_do = q_ptr + h * q_h, d_out_ptr + h * do_h
        p_lse, p_delta = lse_ptr + h * T, delta_ptr + h * T
        for i in tl.range(0, full, num_stages=STAGES):
            first_query = full_tile(i, low, left, list_ptr, BM, LISTED)
            dk, dv = _keys_step(
                dk, dv, b_k, b_v, p_q, p_do, p_lse, p_delta, q_t, do_t, first_query, o_k, start, end, k_start_ptr,
                k_end_ptr, T, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, CAPPED, UPCAST, False, CAREFUL, LISTED,
            )  # fmt: skip
        for i in tl.range(0, left + right, num_stages=STAGES):
            first_query = masked_tile(i, low, left, full, list_ptr, tiles, BM, LISTED)
            dk, dv = _keys_step(
                dk, dv, b_k, b_v, p_q, p_do, p_lse, p_delta, q_t, do_t, first_query, o_k, start, end, k_start_ptr,
                k_end_ptr, T, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, CAPPED, UPCAST, True, CAREFUL, LISTED,
            )  # fmt: skip
    return dk, dv


@jit
def _keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, start_ptr, end_ptr, k_start_ptr, k_end_ptr, list_ptr, dk_ptr,
    dv_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, k_start_b, list_b, tiles, T, S, H, G,
    scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one KV head; ``start`` and ``end`` bound the queries that see each key."""
    first = tl.program_id(0) * BN
    K = H // G
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    start_ptr += b * window_b
    end_ptr += b * window_b
    o_k = first + tl.arange(0, BN)  # [BN]
    start = tl.load(start_ptr + o_k, mask=o_k < S, other=0)  # [BN]
    end = tl.load(end_ptr + o_k, mask=o_k < S, other=0)  # [BN]
    if LISTED:
        k_start_ptr += b * k_start_b
        k_end_ptr += b * k_start_b
        list_ptr += b * list_b + (first // BN) * (2 + 2 * tiles)
        low, left, full, right = listed_tiles(list_ptr)
    else:
        low, left, full, right = window_tiles(start_ptr, end_ptr, first, S, BN, BM)
    b_k = load_tile(k_ptr + b * k_b + kv_head * k_h, first, k_t, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    b_v = load_tile(v_ptr + b * v_b + kv_head * v_h, first, v_t, S, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    h = kv_head * G  # the first of the group, in 64 bits
    q_ptr += b * q_b + h * q_h
    d_out_ptr += b * do_b + h * do_h
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    dk, dv = _keys_walk(
        b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, q_t, q_h, do_t, do_h, low, left, full, right, o_k, start, end,
        k_start_ptr, k_end_ptr, list_ptr, tiles, T, G, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, CAPPED, UPCAST,
        False, LISTED,
    )  # fmt: skip
    if has_nan(dk) | has_nan(dv):
        dk, dv = _keys_walk(
            b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, q_t, q_h, do_t, do_h, low, left, full, right, o_k, start,
            end, k_start_ptr, k_end_ptr, list_ptr, tiles, T, G, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, CAPPED,
            UPCAST, True, LISTED,
        )  # fmt: skip
    store_tile(dk_ptr + (b * S * K + kv_head) * D, first, K * D, dk * scale, S, BN, D, BLOCK_D, UPCAST)
    store_tile(dv_ptr + (b * S * K + kv_head) * DV, first, K * DV, dv, S, BN, DV, BLOCK_DV, UPCAST)


def backward_queries(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds:
    tuple[Tensor, Tensor], scale: float | None, softcap: float, outputs: tuple[Tensor, Tensor],
    paths: Paths | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    launch = launch_of("queries", q, v, T, scale, softcap, HAS_D_LSE=d_lse is not None, LISTED=paths is not None)
    seen, strides_of_paths = arguments_of(paths, 1)
    if B * T * H:
        with on_device(q):
            _queries_kernel[(ceil_div(T, launch.config.tile), B * H)](
                d_out, d_lse, q, k, v, out, lse, *bounds, *seen, *outputs, *strides(d_out, q, k, v),
                row_stride(bounds[0]), *strides_of_paths, T, S, H, H // K, launch.scale, launch.inner, launch.outer,
                **launch.constants,
            )  # fmt: skip
    return outputs


def backward_keys(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, bounds: tuple[Tensor, Tensor],
    scale: float | None, softcap: float, outputs: tuple[Tensor, Tensor], paths: Paths | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    launch = launch_of("keys", q, v, S, scale, softcap, LISTED=paths is not None)
    seen, strides_of_paths = arguments_of(paths, 2)
    if B * S * K:
        with on_device(q):
            _keys_kernel[(ceil_div(S, launch.config.tile), B * K)](
                d_out, q, k, v, lse, delta, *bounds, *seen, *outputs, *strides(d_out, q, k, v), row_stride(bounds[0]),
                *strides_of_paths, T, S, H, H // K, launch.scale, launch.inner, launch.outer, **launch.constants,
            )  # fmt: skip
    return outputs
