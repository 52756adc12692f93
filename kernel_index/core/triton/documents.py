"""Attention whose rows do not depend on the other rows, on a GPU: the kernels behind ``core/device_documents.py``.

A row is a query of one head.  Its keys are taken in segments of BN that are counted from the start of its document, in
rising order, by an online softmax.  A tile holds BM rows: the queries of a KV head's group, of one document after the
other.  What a row does not see has the weight 0 and changes no sum, so neither the tile nor its other rows have a part
in a row's bits.  Where a compiler might contract a product and a sum in one loop alone, ``tl.fma`` says so.

Names and units are those of ``core/triton/attention.py``; ``outer`` is positive.
"""

import triton.language as tl

from kernel_index.core.triton.attention import (
    LOG2E,
    cache_slots,
    finite_max,
    has_nan,
    load_rows,
    load_tile,
    narrow,
    scores,
    softmax_output,
    store_rows,
    within,
)
from kernel_index.core.triton.jit import jit

NOWHERE = tl.constexpr(2**31 - 1)


@jit
def document_of(r, first, count, origin_ptr, o_i, origin, G: tl.constexpr):
    """The document of a tile's r-th row: its first key, which rows of the tile are of it, and the row after them."""
    o = tl.load(origin_ptr + (first + r) // G)
    stop = tl.min(tl.where((o_i >= r) & (origin != o), o_i, count), 0)
    stop = tl.minimum(stop, count)
    return o, (o_i >= r) & (o_i < stop), stop


@jit
def segments_of(m_doc, m_row, start, end, o, BLOCK: tl.constexpr):
    """The segments of BLOCK from ``o`` on that rows ``m_doc`` of a tile visit, and the end of what they see.

    ``begin`` to ``full`` and ``tail`` to ``stop`` are masked; every row of the tile sees all of those between.
    """
    m_some = m_doc & (start < end)
    low = tl.min(tl.where(m_some, start, NOWHERE), 0)
    high = tl.max(tl.where(m_some, end, o), 0)
    low = tl.minimum(low, high)
    begin, stop = (low - o) // BLOCK, tl.cdiv(high - o, BLOCK)
    is_whole = tl.min((m_some | (m_row == 0)).to(tl.int32), 0)
    full = tl.cdiv(tl.max(tl.where(m_some, start, o), 0) - o, BLOCK)
    tail = (tl.minimum(tl.min(tl.where(m_some, end, NOWHERE), 0), high) - o) // BLOCK
    full = tl.where(is_whole == 1, tl.minimum(tl.maximum(full, begin), stop), stop)
    tail = tl.maximum(tl.minimum(tail, stop), full)
    return begin, full, tail, stop, high


@jit
def selection_of(bits_ptr, b, o_t, o_h, T, H, GROUPS, words):
    """Pointers to the bits of queries ``o_t`` and heads ``o_h``, of an int32 tensor [B, T, GROUPS, words]."""
    return bits_ptr + ((b * T + o_t) * GROUPS + o_h // (H // GROUPS)) * words


@jit
def is_selected(p_bits, first, m, SELECT: tl.constexpr, N: tl.constexpr):
    """Whether rows [M] selected each of N keys from the ``first`` of their document on: bool [M, N], where ``m``."""
    if SELECT % N == 0:  # the keys are of one block, since ``first`` is a multiple of N
        block = first // SELECT
        m_row = tl.max(m.to(tl.int32), 1) == 1
        m_own = (tl.load(p_bits + block // 32, mask=m_row, other=0) >> (block % 32)) & 1  # [M]
        m = m & (m_own != 0)[:, None]
    else:
        o_block = (first + tl.arange(0, N)) // SELECT  # [N]
        b_word = tl.load(p_bits[:, None] + (o_block // 32)[None, :], mask=m, other=0)  # [M, N]
        m = m & (((b_word >> (o_block % 32)[None, :]) & 1) != 0)
    return m


@jit
def add_weighted(acc, w, b_x, m_seen, CAREFUL: tl.constexpr, UPCAST: tl.constexpr):
    """acc + w·x in one accumulator [BM, BLOCK_D]: see ``weighted_sum`` of ``attention.py``."""
    if CAREFUL:
        flag = tl.sum(b_x.to(tl.float32) * 0.0, 1)  # [BN]: NaN where a row of x is not finite, else 0
        w = tl.where(m_seen, w + flag[None, :], 0.0)
        b_x = tl.where((flag == 0.0)[:, None], b_x, 0.0)
    w = narrow(w, b_x.dtype, UPCAST)
    if UPCAST:
        w, b_x = w.to(tl.float32), b_x.to(tl.float32)
    return tl.dot(w, b_x, acc, input_precision="ieee")


@jit
def load_keys(
    p_x, first, x_t, x_page, b, table_ptr, table_b, table_s, high,
    BN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """BN consecutive keys or values [BN, BLOCK_D] of a row, or of a paged cache; zeros from ``high`` on."""
    if PAGE == 0:
        b_x = load_tile(p_x, first, x_t, high, BN, D, BLOCK_D)
    else:
        o_k = first + tl.arange(0, BN)
        b_page, o_slot = cache_slots(table_ptr, b, table_b, table_s, o_k, o_k < high, PAGE, True)
        b_x = load_rows(p_x, tl.maximum(b_page, 0) * x_page + o_slot * x_t, o_k < high, D, BLOCK_D)
    return b_x


@jit
def _forward_step(
    acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, k_b, v_b, b, table_ptr, table_b, table_s, p_bits, o, first, high,
    start, end, inner, outer, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BN: tl.constexpr, PAGE: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    b_k = load_keys(p_k, first, k_t, k_b, b, table_ptr, table_b, table_s, high, BN, D, BLOCK_D, PAGE)
    z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
    o_k = first + tl.arange(0, BN)  # [BN]
    m_seen = within(o_k[None, :], start[:, None], end[:, None])  # [BM, BN]
    if SELECT > 0:
        m_seen = is_selected(p_bits, first - o, m_seen, SELECT, BN)
    if MASKED:
        z = tl.where(m_seen, z, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(z, 1) * outer)  # a product that nothing is added to
    shift = finite_max(new_max)
    p = tl.exp2(tl.fma(z, outer, -shift[:, None]))
    alpha = tl.exp2(row_max - shift)  # 1 where the maximum stays
    row_sum = tl.fma(row_sum, alpha, tl.sum(p, 1))
    b_x = load_keys(p_v, first, v_t, v_b, b, table_ptr, table_b, table_s, high, BN, DV, BLOCK_DV, PAGE)
    return add_weighted(acc * alpha[:, None], p, b_x, m_seen, CAREFUL, UPCAST), new_max, row_sum


@jit
def _forward_walk(
    b_q, p_k, p_v, k_t, v_t, k_b, v_b, b, table_ptr, table_b, table_s, p_bits, first, count, origin_ptr, m_row, start,
    end, origin, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    o_i = tl.arange(0, BM)
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    r = count * 0
    while r < count:
        o, m_doc, r = document_of(r, first, count, origin_ptr, o_i, origin, G)
        begin, full, tail, stop, high = segments_of(m_doc, m_row, start, end, o, BN)
        own_start, own_end = tl.where(m_doc, start, 0), tl.where(m_doc, end, 0)  # [BM]
        if CAREFUL or SELECT > 0:
            full, tail = stop, stop
        for j in tl.range(begin, full, num_stages=1 if CAREFUL else None):
            acc, row_max, row_sum = _forward_step(
                acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, k_b, v_b, b, table_ptr, table_b, table_s, p_bits, o,
                o + j * BN, high, own_start, own_end, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, PAGE, SELECT, CAPPED,
                UPCAST, True, CAREFUL,
            )  # fmt: skip
        if not CAREFUL and SELECT == 0:
            for j in tl.range(full, tail):
                acc, row_max, row_sum = _forward_step(
                    acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, k_b, v_b, b, table_ptr, table_b, table_s, p_bits,
                    o, o + j * BN, high, own_start, own_end, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, PAGE, SELECT,
                    CAPPED, UPCAST, False, False,
                )  # fmt: skip
            for j in tl.range(tail, stop):
                acc, row_max, row_sum = _forward_step(
                    acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, k_b, v_b, b, table_ptr, table_b, table_s, p_bits,
                    o, o + j * BN, high, own_start, own_end, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, PAGE, SELECT,
                    CAPPED, UPCAST, True, False,
                )  # fmt: skip
    return acc, row_max, row_sum


@jit
def rows_of_tile(program, T, start_ptr, end_ptr, origin_ptr, BM: tl.constexpr, G: tl.constexpr):
    """A tile's first row, how many it has, its queries and heads of the group, and the bounds of its rows."""
    first = program * BM
    o_r = first + tl.arange(0, BM)  # [BM]
    m_row = o_r < T * G
    o_t = o_r // G
    start = tl.load(start_ptr + o_t, mask=m_row, other=0)
    end = tl.load(end_ptr + o_t, mask=m_row, other=0)
    origin = tl.load(origin_ptr + o_t, mask=m_row, other=-1)
    return first, tl.minimum(T * G - first, BM), o_t, o_r % G, m_row, start, end, origin


@jit
def documents_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, start_ptr, end_ptr, origin_ptr, table_ptr, bits_ptr, out_ptr, lse_ptr,
    k_b, k_t, k_h, v_b, v_t, v_h, bounds_b, lse_h, table_b, table_s, GROUPS, words, T, K, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr,
    HAS_SINK: tl.constexpr, UPCAST: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one KV head's group.  q and out are dense, lse is [B, H, T] with a distance of
    ``lse_h`` between heads; ``PAGE`` 0 is a cache, or a batch, by rows.
    ``AGAIN``: they are there, and a tile that holds a NaN is made again.
    """
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    start_ptr += b * bounds_b
    end_ptr += b * bounds_b
    origin_ptr += b * bounds_b
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the long rows of a causal mask begin first
    first, count, o_t, o_g, m_row, start, end, origin = rows_of_tile(
        program, T, start_ptr, end_ptr, origin_ptr, BM, G
    )  # fmt: skip
    o_row = (b * T + o_t) * (K * G) + kv_head * G + o_g  # [BM], 64 bits
    b_q = load_rows(q_ptr, o_row * D, m_row, D, BLOCK_D)  # [BM, BLOCK_D]
    p_k, p_v = k_ptr + kv_head * k_h, v_ptr + kv_head * v_h
    if PAGE == 0:
        p_k += b * k_b
        p_v += b * v_b
    p_bits = selection_of(bits_ptr, b, o_t, kv_head * G + o_g, T, K * G, GROUPS, words) if SELECT > 0 else bits_ptr
    if AGAIN:
        acc, row_max = load_rows(out_ptr, o_row * DV, m_row, DV, BLOCK_DV).to(tl.float32), tl.zeros((BM,), tl.float32)
        row_sum = row_max
    else:
        acc, row_max, row_sum = _forward_walk(
            b_q, p_k, p_v, k_t, v_t, k_b, v_b, b, table_ptr, table_b, table_s, p_bits, first, count, origin_ptr, m_row,
            start, end, origin, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, G, PAGE, SELECT, CAPPED, UPCAST, False,
        )  # fmt: skip
    is_nan = has_nan(acc)
    if is_nan:
        acc, row_max, row_sum = _forward_walk(
            b_q, p_k, p_v, k_t, v_t, k_b, v_b, b, table_ptr, table_b, table_s, p_bits, first, count, origin_ptr, m_row,
            start, end, origin, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, G, PAGE, SELECT, CAPPED, UPCAST, True,
        )  # fmt: skip
    m_empty = start >= end  # [BM]
    if SELECT > 0:
        m_empty |= row_max == float("-inf")
    if HAS_SINK:  # the sink logit is part of the denominator of every query that has a key
        sink = tl.load(sink_ptr + kv_head * G + o_g).to(tl.float32) * LOG2E  # [BM]
        new_max = tl.where(m_empty, 0.0, tl.maximum(row_max, sink))
        alpha = tl.exp2(row_max - new_max)
        acc = acc * alpha[:, None]
        row_sum = tl.fma(row_sum, alpha, tl.exp2(sink - new_max))
        row_max = new_max
    if is_nan or not AGAIN:
        out, lse = softmax_output(acc, row_max, row_sum, m_empty)
        store_rows(out_ptr, o_row * DV, m_row, out, DV, BLOCK_DV, UPCAST)
        tl.store(lse_ptr + (b * (K * G) + kv_head * G + o_g) * lse_h + o_t, lse, mask=m_row)
