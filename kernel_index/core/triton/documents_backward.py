"""The gradients of ``documents.py``: dQ by tiles of rows over their keys, dK and dV by tiles of keys over queries.

Queries of a document are taken in segments of BM from its first one, a head of the group after the other, so that a key
has the bits that it has alone.  There is a query for each key.
"""

import triton.language as tl

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
    within,
)
from kernel_index.core.triton.documents import (
    add_weighted,
    document_of,
    is_selected,
    rows_of_tile,
    segments_of,
    selection_of,
)
from kernel_index.core.triton.jit import jit


@jit
def _queries_step(
    dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_bits, o, first, high, start, end, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    SELECT: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    b_k = load_tile(p_k, first, k_t, high, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
    p = tl.exp2(tl.fma(z, outer, -lse[:, None]))
    o_k = first + tl.arange(0, BN)  # [BN]
    m_seen = within(o_k[None, :], start[:, None], end[:, None])  # [BM, BN]
    if SELECT > 0:
        m_seen = is_selected(p_bits, first - o, m_seen, SELECT, BN)
    b_v = load_tile(p_v, first, v_t, high, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    dz = score_grad(z, p, dot(b_do, tl.trans(b_v), UPCAST), delta[:, None], CAPPED)  # [BM, BN]
    if MASKED:
        dz = tl.where(m_seen, dz, 0.0)
    return add_weighted(dq, dz, b_k, m_seen, CAREFUL, UPCAST)


@jit
def _queries_walk(
    b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_bits, first, count, origin_ptr, m_row, start, end, origin, inner,
    outer, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    o_i = tl.arange(0, BM)
    dq = tl.zeros((BM, BLOCK_D), tl.float32)
    r = count * 0
    while r < count:
        o, m_doc, r = document_of(r, first, count, origin_ptr, o_i, origin, G)
        begin, full, tail, stop, high = segments_of(m_doc, m_row, start, end, o, BN)
        own_start, own_end = tl.where(m_doc, start, 0), tl.where(m_doc, end, 0)  # [BM]
        if CAREFUL or SELECT > 0:
            full, tail = stop, stop
        for j in tl.range(begin, full, num_stages=1 if CAREFUL else None):
            dq = _queries_step(
                dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_bits, o, o + j * BN, high, own_start, own_end,
                inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, SELECT, CAPPED, UPCAST, True, CAREFUL,
            )  # fmt: skip
        if not CAREFUL and SELECT == 0:
            for j in tl.range(full, tail):
                dq = _queries_step(
                    dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_bits, o, o + j * BN, high, own_start,
                    own_end, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, SELECT, CAPPED, UPCAST, False, False,
                )  # fmt: skip
            for j in tl.range(tail, stop):
                dq = _queries_step(
                    dq, b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_bits, o, o + j * BN, high, own_start,
                    own_end, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, SELECT, CAPPED, UPCAST, True, False,
                )  # fmt: skip
    return dq


@jit
def queries_kernel(
    d_out_ptr, d_lse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, end_ptr, origin_ptr, bits_ptr, dq_ptr,
    delta_ptr, k_b, k_t, k_h, v_b, v_t, v_h, bounds_b, lse_h, GROUPS, words, T, K, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr, HAS_D_LSE: tl.constexpr,
    UPCAST: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of rows, and its ``delta`` for the keys' kernel.

    ``AGAIN``: they are there, and dQ of a tile that holds a NaN is made again.
    """
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    start_ptr += b * bounds_b
    end_ptr += b * bounds_b
    origin_ptr += b * bounds_b
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first, count, o_t, o_g, m_row, start, end, origin = rows_of_tile(
        program, T, start_ptr, end_ptr, origin_ptr, BM, G
    )  # fmt: skip
    o_row = (b * T + o_t) * (K * G) + kv_head * G + o_g  # [BM], 64 bits
    o_number = (b * (K * G) + kv_head * G + o_g) * lse_h + o_t  # [BM], 64 bits
    m_some = start < end  # [BM]
    b_do = load_rows(d_out_ptr, o_row * DV, m_row, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    if AGAIN:
        delta = tl.load(delta_ptr + o_number, mask=m_row, other=0.0)  # [BM]
    else:
        b_out = load_rows(out_ptr, o_row * DV, m_row, DV, BLOCK_DV)  # [BM, BLOCK_DV]
        delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)  # [BM]
        if HAS_D_LSE:
            delta -= tl.load(d_lse_ptr + o_row, mask=m_row, other=0.0)
        delta = tl.where(m_some, delta, 0.0)
        tl.store(delta_ptr + o_number, delta, mask=m_row)
    lse = lse_of_grad(tl.load(lse_ptr + o_number, mask=m_row, other=0.0), m_some)  # [BM]
    b_q = load_rows(q_ptr, o_row * D, m_row, D, BLOCK_D)  # [BM, BLOCK_D]
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    p_bits = selection_of(bits_ptr, b, o_t, kv_head * G + o_g, T, K * G, GROUPS, words) if SELECT > 0 else bits_ptr
    if AGAIN:
        dq = load_rows(dq_ptr, o_row * D, m_row, D, BLOCK_D).to(tl.float32)
    else:
        dq = _queries_walk(
            b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_bits, first, count, origin_ptr, m_row, start, end, origin,
            inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, G, SELECT, CAPPED, UPCAST, False,
        )  # fmt: skip
    is_nan = has_nan(dq)
    if is_nan:
        dq = _queries_walk(
            b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_bits, first, count, origin_ptr, m_row, start, end, origin,
            inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, G, SELECT, CAPPED, UPCAST, True,
        )  # fmt: skip
    if is_nan or not AGAIN:
        store_rows(dq_ptr, o_row * D, m_row, dq * scale, D, BLOCK_D, UPCAST)


@jit
def _keys_step(
    dk, dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_bits, bits_t, o_block, first, high, start, end, inner, outer,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Scores are transposed, [BN, BM], so that dK and dV are products without a transposed operand."""
    o_q = first + tl.arange(0, BM)  # [BM]
    b_q = load_tile(p_q, first, H * D, high, BM, D, BLOCK_D)  # [BM, BLOCK_D]
    b_lse = tl.load(p_lse + o_q, mask=o_q < high, other=float("inf"))  # [BM]
    b_delta = tl.load(p_delta + o_q, mask=o_q < high, other=0.0)  # [BM]
    z = scores(b_k, b_q, inner, CAPPED, UPCAST)  # [BN, BM]
    p = tl.exp2(tl.fma(z, outer, -b_lse[None, :]))
    m_seen = within(o_q[None, :], start[:, None], end[:, None])  # [BN, BM]
    if SELECT > 0:
        p_words = p_bits + (o_q.to(tl.int64) * bits_t)[None, :] + (o_block // 32)[:, None]
        m_seen &= ((tl.load(p_words, mask=m_seen, other=0) >> (o_block % 32)[:, None]) & 1) != 0
    if MASKED:
        p = tl.where(m_seen, p, 0.0)
    b_do = load_tile(p_do, first, H * DV, high, BM, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    dv = add_weighted(dv, p, b_do, m_seen, CAREFUL, UPCAST)
    dz = score_grad(z, p, dot(b_v, tl.trans(b_do), UPCAST), b_delta[None, :], CAPPED)  # [BN, BM]
    if MASKED:
        dz = tl.where(m_seen, dz, 0.0)
    return add_weighted(dk, dz, b_q, m_seen, CAREFUL, UPCAST), dv


@jit
def _keys_walk(
    b_k, b_v, p_q, p_do, p_lse, p_delta, lse_h, bits_ptr, bits_t, words, head, heads, first, count, origin_ptr, m_row,
    start, end, origin, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, H: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Over the queries of the G heads of a group, whose first is ``head``; other pointers are to it.

    ``bits_ptr`` is to the row's selections, which ``heads`` heads share.
    """
    o_i = tl.arange(0, BN)
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    r = count * 0
    while r < count:
        o, m_doc, r = document_of(r, first, count, origin_ptr, o_i, origin, 1)
        begin, full, tail, stop, high = segments_of(m_doc, m_row, start, end, o, BM)
        own_start, own_end = tl.where(m_doc, start, 0), tl.where(m_doc, end, 0)  # [BN]
        if CAREFUL or SELECT > 0:
            full, tail = stop, stop
        o_block = (first + o_i - o) // SELECT if SELECT > 0 else o_i  # [BN]
        for g in range(0, G):
            p_bits = bits_ptr + (head + g) // heads * words if SELECT > 0 else bits_ptr
            g_q, g_do, g_lse, g_delta = p_q + g * D, p_do + g * DV, p_lse + g * lse_h, p_delta + g * lse_h
            for j in tl.range(begin, full, num_stages=1 if CAREFUL else None):
                dk, dv = _keys_step(
                    dk, dv, b_k, b_v, g_q, g_do, g_lse, g_delta, p_bits, bits_t, o_block, o + j * BM, high, own_start,
                    own_end, inner, outer, H, D, DV, BLOCK_D, BLOCK_DV, BM, SELECT, CAPPED, UPCAST, True, CAREFUL,
                )  # fmt: skip
            if not CAREFUL and SELECT == 0:
                for j in tl.range(full, tail):
                    dk, dv = _keys_step(
                        dk, dv, b_k, b_v, g_q, g_do, g_lse, g_delta, p_bits, bits_t, o_block, o + j * BM, high,
                        own_start, own_end, inner, outer, H, D, DV, BLOCK_D, BLOCK_DV, BM, SELECT, CAPPED, UPCAST,
                        False, False,
                    )  # fmt: skip
                for j in tl.range(tail, stop):
                    dk, dv = _keys_step(
                        dk, dv, b_k, b_v, g_q, g_do, g_lse, g_delta, p_bits, bits_t, o_block, o + j * BM, high,
                        own_start, own_end, inner, outer, H, D, DV, BLOCK_D, BLOCK_DV, BM, SELECT, CAPPED, UPCAST,
                        True, False,
                    )  # fmt: skip
    return dk, dv


@jit
def keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, start_ptr, end_ptr, origin_ptr, bits_ptr, dk_ptr, dv_ptr,
    k_b, k_t, k_h, v_b, v_t, v_h, bounds_b, lse_h, GROUPS, words, T, K, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, H: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one KV head; ``start`` and ``end`` bound the queries that see each key.

    ``AGAIN``: they are there, and a tile that holds a NaN is made again.
    """
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    start_ptr += b * bounds_b
    end_ptr += b * bounds_b
    origin_ptr += b * bounds_b
    p_dk, p_dv = dk_ptr + (b * T * K + kv_head) * D, dv_ptr + (b * T * K + kv_head) * DV
    first, count, _, _, m_row, start, end, origin = rows_of_tile(
        tl.program_id(0), T, start_ptr, end_ptr, origin_ptr, BN, 1
    )  # fmt: skip
    b_k = load_tile(k_ptr + b * k_b + kv_head * k_h, first, k_t, T, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    b_v = load_tile(v_ptr + b * v_b + kv_head * v_h, first, v_t, T, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    head = kv_head * G  # the first of the group
    p_q, p_do = q_ptr + (b * T * H + head) * D, d_out_ptr + (b * T * H + head) * DV  # of the row's first query
    p_lse, p_delta = lse_ptr + (b * H + head) * lse_h, delta_ptr + (b * H + head) * lse_h
    bits_t = GROUPS * words
    p_bits = bits_ptr + b * T * bits_t if SELECT > 0 else bits_ptr
    if AGAIN:
        dk = load_tile(p_dk, first, K * D, T, BN, D, BLOCK_D).to(tl.float32)
        dv = load_tile(p_dv, first, K * DV, T, BN, DV, BLOCK_DV).to(tl.float32)
    else:
        dk, dv = _keys_walk(
            b_k, b_v, p_q, p_do, p_lse, p_delta, lse_h, p_bits, bits_t, words, head, H // GROUPS, first, count,
            origin_ptr, m_row, start, end, origin, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, G, H, SELECT, CAPPED,
            UPCAST, False,
        )  # fmt: skip
    is_nan = has_nan(dk) | has_nan(dv)
    if is_nan:
        dk, dv = _keys_walk(
            b_k, b_v, p_q, p_do, p_lse, p_delta, lse_h, p_bits, bits_t, words, head, H // GROUPS, first, count,
            origin_ptr, m_row, start, end, origin, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, G, H, SELECT,
            CAPPED, UPCAST, True,
        )  # fmt: skip
    if is_nan or not AGAIN:
        store_tile(p_dk, first, K * D, dk * scale, T, BN, D, BLOCK_D, UPCAST)
        store_tile(p_dv, first, K * DV, dv, T, BN, DV, BLOCK_DV, UPCAST)
