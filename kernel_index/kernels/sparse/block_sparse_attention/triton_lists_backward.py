"""Backward by key block: one pass over the lists makes dK, dV and, for every selected block of a row, a partial of dQ.

Partials are added in a fixed order, never by atomics, so two runs give the same bits.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    dot,
    has_nan,
    load_rows,
    load_tile,
    lse_of_grad,
    narrow,
    score_grad,
    scores,
    store_rows,
    weighted_sum,
    within,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import AttentionLaunch, ceil_div, on_device, row_stride, strides
from kernel_index.kernels.sparse.block_sparse_attention.lists import (
    ListPlan,
    for_hopper,
    parts_of,
    segments_at_once,
    segments_of,
    shift_of,
)
from kernel_index.kernels.sparse.block_sparse_attention.triton_lists import (
    ROWS,
    load_entries,
    load_part,
    merged_rows,
    segment_place,
    unfit_blocks,
)


@jit
def _delta_kernel(
    out_ptr, d_out_ptr, d_lse_ptr, delta_ptr, do_b, do_t, do_h, dl_b, dl_h, dl_t, TOKENS, T, H,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_D_LSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_m = o_row < tl.cast(TOKENS, tl.int64) * H
    h, token = o_row % H, o_row // H
    b, t = token // T, token % T
    b_out = load_rows(out_ptr, o_row * DV, m_m, DV, BLOCK_DV).to(tl.float32)  # [ROWS, BLOCK_DV]
    b_do = load_rows(d_out_ptr, b * do_b + t * do_t + h * do_h, m_m, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(b_out * b_do, 1)  # [ROWS]
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + b * dl_b + h * dl_h + t * dl_t, mask=m_m, other=0.0)
    tl.store(delta_ptr + o_row, delta, mask=m_m)


@jit
def _lists_step(
    dk, dv, b_k, b_v, p_q, p_do, lse_ptr, delta_ptr, p_order, p_start, p_end, dq_ptr, written_ptr, i, stop, o_k,
    last_key, first_partial, first_query, q_t, q_h, do_t, do_h, H, N, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, WITH_DQ: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """BM rows of a list.  Scores are transposed, [BN, BM]: dK and dV are products without a transposed operand."""
    o_g = tl.arange(0, BM) % HEADS  # [BM]
    token, o_nth, m_m = load_entries(p_order, i + tl.arange(0, BM) // HEADS, stop, SHIFT)  # [BM]
    if GROUP < HEADS:
        m_m = m_m & (o_g < GROUP)
    o_row = token.to(tl.int64) * H + o_g
    start = tl.load(p_start + token, mask=m_m, other=0)  # [BM]
    end = tl.minimum(tl.load(p_end + token, mask=m_m, other=0), last_key)  # [BM]
    b_lse = tl.load(lse_ptr + o_row, mask=m_m, other=float("inf"))  # [BM]
    lse = lse_of_grad(b_lse, b_lse != float("-inf"))
    b_delta = tl.load(delta_ptr + o_row, mask=m_m, other=0.0)  # [BM]
    b_q = load_rows(p_q, token.to(tl.int64) * q_t + o_g * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
    b_do = load_rows(p_do, token.to(tl.int64) * do_t + o_g * do_h, m_m, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    z = scores(b_k, b_q, inner, CAPPED, UPCAST)  # [BN, BM]
    p = tl.exp2(z * outer - lse[None, :])
    m_seen = within(o_k[:, None], start[None, :], end[None, :])  # [BN, BM]
    p = tl.where(m_seen, p, 0.0)
    dv += weighted_sum(p, b_do, m_seen, CAREFUL, UPCAST)
    dz = score_grad(z, p, dot(b_v, tl.trans(b_do), UPCAST), b_delta[None, :], CAPPED)  # [BN, BM]
    dk += weighted_sum(dz, b_q, m_seen, CAREFUL, UPCAST)
    if WITH_DQ:
        if CAREFUL:
            m_sees = within(o_k[None, :], start[:, None], end[:, None])  # [BM, BN]
            dq = weighted_sum(tl.trans(dz), b_k, m_sees, True, UPCAST)
        else:
            dq = dot(tl.trans(narrow(dz, b_q.dtype, UPCAST)), b_k, UPCAST)  # [BM, BLOCK_D]
        o_entry = first_partial + (token - first_query).to(tl.int64) * N + o_nth
        o_partial = o_entry * GROUP + o_g
        store_rows(dq_ptr, o_partial * D, m_m, dq * scale, D, BLOCK_D, UPCAST)
        tl.store(written_ptr + o_entry, tl.full((BM,), 1, tl.int8), mask=m_m)
    return dk, dv


@jit
def _lists_walk(
    b_k, b_v, p_q, p_do, lse_ptr, delta_ptr, p_order, p_start, p_end, dq_ptr, written_ptr, first, stop, o_k, last_key,
    first_partial, first_query, q_t, q_h, do_t, do_h, H, N, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, WITH_DQ: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    STAGES: tl.constexpr = 1 if CAREFUL else None
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    for i in tl.range(first, stop, BM // HEADS, num_stages=STAGES):
        dk, dv = _lists_step(
            dk, dv, b_k, b_v, p_q, p_do, lse_ptr, delta_ptr, p_order, p_start, p_end, dq_ptr, written_ptr, i, stop,
            o_k, last_key, first_partial, first_query, q_t, q_h, do_t, do_h, H, N, scale, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BM, GROUP, HEADS, SHIFT, CAPPED, UPCAST, WITH_DQ, CAREFUL,
        )  # fmt: skip
    return dk, dv


@jit
def _lists_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, order_ptr, items_ptr, start_ptr, end_ptr, dq_ptr, written_ptr,
    dk_ptr, dv_ptr, do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, first_segment, T, S,
    G, GROUPS, N, M, CHUNK, CHUNKS, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, WITH_DQ: tl.constexpr,
):  # fmt: skip
    """The partials of dQ, dK and dV that one part of a segment's lists gives; those of dQ where they are asked for."""
    o_launch = tl.program_id(1)
    segment = first_segment + o_launch
    b, g, chunk = segment_place(segment, CHUNKS, G)
    block, begin, first, stop = load_part(items_ptr, segment, M)
    order_ptr += begin
    H = G * GROUP
    lse_ptr += b * T * H + g * GROUP
    delta_ptr += b * T * H + g * GROUP
    if first < stop:
        first_key = block * BLOCK
        last_key = tl.minimum(first_key + BLOCK, S)
        kv_head = g // GROUPS
        b_k = load_tile(k_ptr + b * k_b + kv_head * k_h, first_key, k_t, last_key, BN, D, BLOCK_D)  # [BN, BLOCK_D]
        b_v = load_tile(v_ptr + b * v_b + kv_head * v_h, first_key, v_t, last_key, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
        o_k = first_key + tl.arange(0, BN)  # [BN]
        q_ptr += b * q_b + g * GROUP * q_h
        d_out_ptr += b * do_b + g * GROUP * do_h
        start_ptr += b * window_b
        end_ptr += b * window_b
        first_query = chunk * CHUNK
        first_partial = o_launch.to(tl.int64) * CHUNK * N
        dk, dv = _lists_walk(
            b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, end_ptr, dq_ptr, written_ptr, first,
            stop, o_k, last_key, first_partial, first_query, q_t, q_h, do_t, do_h, H, N, scale, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BM, BN, GROUP, HEADS, SHIFT, CAPPED, UPCAST, WITH_DQ, False,
        )  # fmt: skip
        # Keys that are not finite spoil partials of dQ alone, which are not looked at here.
        if has_nan(dk) | has_nan(dv) | has_nan(b_k.to(tl.float32) * 0.0):
            dk, dv = _lists_walk(
                b_k, b_v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, end_ptr, dq_ptr, written_ptr,
                first, stop, o_k, last_key, first_partial, first_query, q_t, q_h, do_t, do_h, H, N, scale, inner,
                outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, GROUP, HEADS, SHIFT, CAPPED, UPCAST, WITH_DQ, True,
            )  # fmt: skip
        o_n = (o_launch.to(tl.int64) * M + tl.program_id(0)) * BN + tl.arange(0, BN)  # [BN]
        m_all = tl.full((BN,), 1, tl.int1)
        store_rows(dk_ptr, o_n * D, m_all, dk * scale, D, BLOCK_D, UPCAST)
        store_rows(dv_ptr, o_n * DV, m_all, dv, DV, BLOCK_DV, UPCAST)


@jit
def _merge_queries_kernel(
    partial_ptr, written_ptr, dq_ptr, sizes_ptr, first_segment, T, G, N, CHUNK, CHUNKS, TILES,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the partials of dQ of a row that were written, in the order of its selected blocks."""
    o_entry, o_g, o_row, m_m = merged_rows(
        sizes_ptr, first_segment, T, G, N, CHUNK, CHUNKS, TILES, GROUP, TILE, ROWS
    )  # [ROWS]
    if TILE > 0 and tl.max(m_m.to(tl.int32), 0) == 0:
        return
    dq = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for j in range(0, N):
        m_written = tl.load(written_ptr + o_entry + j, mask=m_m, other=0) != 0  # [ROWS]
        dq += load_rows(partial_ptr, ((o_entry + j) * GROUP + o_g) * D, m_written, D, BLOCK_D).to(tl.float32)
    store_rows(dq_ptr, o_row * D, m_m, dq, D, BLOCK_D, UPCAST)


@jit
def _merge_keys_kernel(
    dk_partial_ptr, dv_partial_ptr, parts_ptr, dk_ptr, dv_ptr, first_segment, S, K, G, CHUNKS, BLOCKS, M, TOGETHER,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr, UPCAST: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Adds the partials of ``TOGETHER`` segments of one KV head, in order, to float32 sums; WAYS of each part."""
    block = tl.program_id(0)
    o_launch = tl.program_id(1) * TOGETHER
    segment = first_segment + o_launch
    b, g, _chunk = segment_place(segment, CHUNKS, G)
    kv_head = g // (G // K)
    some = block * 0
    for n in range(0, TOGETHER):
        p_parts = parts_ptr + (segment + n).to(tl.int64) * (BLOCKS + 1) + block
        some += tl.load(p_parts + 1) - tl.load(p_parts)
    if some == 0:
        return
    o_n = tl.arange(0, BN)  # [BN]
    m_n = (o_n < BLOCK) & (block * BLOCK + o_n < S)
    o_k = (b * S + block * BLOCK + o_n) * K + kv_head
    dk = load_rows(dk_ptr, o_k * D, m_n, D, BLOCK_D)  # [BN, BLOCK_D]
    dv = load_rows(dv_ptr, o_k * DV, m_n, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    for n in range(0, TOGETHER):
        p_parts = parts_ptr + (segment + n).to(tl.int64) * (BLOCKS + 1) + block
        for part in range(tl.load(p_parts) * WAYS, tl.load(p_parts + 1) * WAYS):
            o_partial = ((o_launch + n).to(tl.int64) * (M * WAYS) + part) * BN + o_n
            dk += load_rows(dk_partial_ptr, o_partial * D, m_n, D, BLOCK_D)
            dv += load_rows(dv_partial_ptr, o_partial * DV, m_n, DV, BLOCK_DV)
    store_rows(dk_ptr, o_k * D, m_n, dk, D, BLOCK_D, UPCAST)
    store_rows(dv_ptr, o_k * DV, m_n, dv, DV, BLOCK_DV, UPCAST)


def delta_of(d_out: Tensor, d_lse: Tensor | None, out: Tensor, launch: AttentionLaunch) -> Tensor:
    """[B, T, H]: what is subtracted from the gradient of a probability."""
    (B, T, H, _), c = out.shape, launch.constants
    delta = torch.empty((B, T, H), dtype=torch.float32, device=out.device)
    if B * T * H:
        with on_device(out):
            _delta_kernel[(ceil_div(B * T * H, ROWS),)](
                out, d_out, d_lse, delta, *strides(d_out, d_out if d_lse is None else d_lse), B * T, T, H,
                HAS_D_LSE=d_lse is not None, ROWS=ROWS, DV=c["DV"], BLOCK_DV=c["BLOCK_DV"],
            )  # fmt: skip
    return delta


HOPPER = True


def backward(
    of_rows: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, plan: ListPlan,
    bounds: tuple[Tensor, Tensor], launch: AttentionLaunch, outputs: tuple[Tensor | None, Tensor, Tensor],
    of_tiles: tuple[Tensor | None, int] = (None, 0), bad: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill dQ, and add to dK and dV of float32; some segments at a time, so that partials are few.

    ``of_rows``: the gradient of the output, the log-sum-exp, base 2, and ``delta``; without dQ, dK and dV alone;
    ``of_tiles`` and ``bad``: see ``triton_lists.forward``.
    """
    (B, T, H, D), (S, K), (dq, dk, dv) = q.shape, k.shape[1:3], outputs
    if B * T * H == 0:
        return
    c, DV, cut = launch.constants, v.shape[3], segments_of(q, v, plan.order.numel(), launch.constants["GROUP"])
    items, blocks, with_dq = plan.items.shape[1], plan.parts.shape[1] - 1, dq is not None
    queries = {name: c[name] for name in ("D", "BLOCK_D", "GROUP", "UPCAST")} | {"ROWS": ROWS}
    keys = {name: c[name] for name in ("D", "DV", "BLOCK_D", "BLOCK_DV", "BN", "BLOCK", "UPCAST")}
    of_queries = cut.entries * cut.group * D * q.element_size() if with_dq else 0
    hopper = HOPPER and c["BLOCK"] == 64 and for_hopper(plan, launch, q, k, v, of_rows[0])
    ways = 2 if hopper and not with_dq else 1  # partials of dK and dV of a part
    at_once = segments_at_once(of_queries + ways * items * c["BN"] * (D + DV) * 4, cut, K)
    dq_partials = q.new_empty((at_once, cut.entries, cut.group, D)) if with_dq else None
    written = q.new_empty((at_once, cut.entries), dtype=torch.int8) if with_dq else None
    dk_partials, dv_partials = (dk.new_empty((at_once, ways * items, c["BN"], width)) for width in (D, DV))
    filled, (sizes, tile) = (dq_partials, written, dk_partials, dv_partials), of_tiles
    place = (T, cut.groups, cut.count, cut.chunk, cut.chunks, ceil_div(T, max(1, tile)))
    with on_device(q):
        bad = unfit_blocks(k, v, blocks, c) if hopper and bad is None else bad
        for first, segments in parts_of(cut.segments, at_once):
            if written is not None:
                written.zero_()
            if hopper:
                from kernel_index.kernels.sparse.block_sparse_attention import (
                    triton_hopper_backward,
                    triton_hopper_keys,
                )

                part, given = (first, segments), (of_rows, q, k, v, plan, bounds, cut)
                if with_dq:
                    triton_hopper_backward.lists(*given, part, bad, launch, filled)
                else:
                    triton_hopper_keys.keys(*given, part, bad, launch, filled[2:])
            else:
                _lists_kernel[(items, segments)](
                    of_rows[0], q, k, v, *of_rows[1:], plan.order, plan.items, *bounds, *filled,
                    *strides(of_rows[0], q, k, v), row_stride(bounds[0]), first, T, S, cut.groups, cut.groups // K,
                    cut.count, items, cut.chunk, cut.chunks, launch.scale, launch.inner, launch.outer,
                    SHIFT=shift_of(cut.count), WITH_DQ=with_dq, **c,
                )  # fmt: skip
            if with_dq:
                _merge_queries_kernel[(ceil_div(cut.chunk * cut.group, ROWS), segments)](
                    dq_partials, written, dq, sizes, first, *place, TILE=tile, **queries
                )
            together = min(segments, cut.per_kv_head(K))
            if blocks:
                _merge_keys_kernel[(blocks, segments // together)](
                    dk_partials, dv_partials, plan.parts, dk, dv, first, S, K, cut.groups, cut.chunks, blocks, items,
                    together, WAYS=ways, **keys, num_warps=8,
                )  # fmt: skip
