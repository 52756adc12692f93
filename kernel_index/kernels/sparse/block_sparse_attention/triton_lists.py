"""Forward by key block: a partial output and log-sum-exp for every selected block, then one pass that merges a row's.

A program holds one block's keys and values and visits a part of the list of queries that selected it.  Since each row
of a product has selected the block, no product is wasted; the cost is that partials are written and read once.  Names
and units are those of ``core/triton/attention.py``; an entry is one selected block of one query, and has a row for each
head of the group that shares it.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    finite_max,
    has_nan,
    load_rows,
    load_tile,
    scores,
    softmax_output,
    store_rows,
    weighted_sum,
    within,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import (
    AttentionLaunch,
    ceil_div,
    next_power_of_2,
    on_device,
    row_stride,
    strides,
)
from kernel_index.kernels.sparse.block_sparse_attention.lists import (
    ListPlan,
    for_hopper,
    parts_of,
    segments_at_once,
    segments_of,
    shift_of,
)

ROWS = 16
"""Rows of a program that merges partials."""


@jit
def load_entries(p_order, o_n, stop, SHIFT: tl.constexpr):
    """Entries of a list as (query, which of its selected blocks, whether the entry counts)."""
    b_entry = tl.load(p_order + o_n, mask=o_n < stop, other=-1)  # [BM]
    m_counts = b_entry >= 0
    b_entry = tl.where(m_counts, b_entry, 0)
    return b_entry >> SHIFT, b_entry & ((1 << SHIFT) - 1), m_counts


@jit
def load_part(p_items, segment, M):
    """Of one part of a list: its block, where the list begins, and where the part begins and ends in the list."""
    p_item = p_items + (segment.to(tl.int64) * M + tl.program_id(0)) * 4
    block = tl.load(p_item).to(tl.int32)
    begin = tl.load(p_item + 1)
    return block, begin, (tl.load(p_item + 2) - begin).to(tl.int32), (tl.load(p_item + 3) - begin).to(tl.int32)


@jit
def segment_place(segment, CHUNKS, G):
    """Batch row and group of a segment, in 64 bits, and which of the group's chunks of queries it is."""
    group = segment // CHUNKS
    return (group // G).to(tl.int64), (group % G).to(tl.int64), segment % CHUNKS


@jit
def _partials_walk(
    b_k, b_v, q_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, q_t, q_h, first, stop, o_k, last_key,
    first_partial, first_query, N, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The entries ``first`` to ``stop`` of a list; pointers are to the batch row and the group's first head."""
    o_g = tl.arange(0, BM) % HEADS  # [BM]
    for i in range(first, stop, BM // HEADS):
        token, o_nth, m_m = load_entries(order_ptr, i + tl.arange(0, BM) // HEADS, stop, SHIFT)  # [BM]
        if GROUP < HEADS:
            m_m = m_m & (o_g < GROUP)
        start = tl.load(start_ptr + token, mask=m_m, other=0)  # [BM]
        end = tl.minimum(tl.load(end_ptr + token, mask=m_m, other=0), last_key)  # [BM]
        b_q = load_rows(q_ptr, token.to(tl.int64) * q_t + o_g * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
        m_seen = within(o_k[None, :], start[:, None], end[:, None])  # [BM, BN]
        logits = tl.where(m_seen, z * outer, float("-inf"))
        row_max = tl.max(logits, 1)  # [BM]
        p = tl.exp2(logits - finite_max(row_max)[:, None])
        row_sum = tl.sum(p, 1)
        acc = weighted_sum(p, b_v, m_seen, CAREFUL, UPCAST)
        if CAREFUL:  # the merge must not take a row of NaN for an empty one
            row_sum += tl.sum(acc * 0.0, 1)
        out, lse = softmax_output(acc, row_max, row_sum, row_sum == 0.0)
        o_entry = (token - first_query).to(tl.int64) * N + o_nth
        o_partial = (first_partial + o_entry) * GROUP + o_g
        store_rows(out_ptr, o_partial * DV, m_m, out, DV, BLOCK_DV, UPCAST)
        tl.store(lse_ptr + o_partial, lse, mask=m_m)


@jit
def _partials_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, items_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, first_segment, S, G, GROUPS, N, M, CHUNK, CHUNKS,
    inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One of the M parts of a segment's lists; a query has N entries, each with its own partials."""
    o_launch = tl.program_id(1)
    segment = first_segment + o_launch
    b, g, chunk = segment_place(segment, CHUNKS, G)
    block, begin, first, stop = load_part(items_ptr, segment, M)
    order_ptr += begin
    first_key = block * BLOCK
    last_key = tl.minimum(first_key + BLOCK, S)
    kv_head = g // GROUPS
    b_k = load_tile(k_ptr + b * k_b + kv_head * k_h, first_key, k_t, last_key, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    b_v = load_tile(v_ptr + b * v_b + kv_head * v_h, first_key, v_t, last_key, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    o_k = first_key + tl.arange(0, BN)  # [BN]
    q_ptr += b * q_b + g * GROUP * q_h
    start_ptr += b * window_b
    end_ptr += b * window_b
    first_query = chunk * CHUNK
    first_partial = o_launch.to(tl.int64) * CHUNK * N
    not_finite = has_nan(b_v.to(tl.float32) * 0.0)  # a value of this block
    _partials_walk(
        b_k, b_v, q_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, q_t, q_h, first, stop, o_k, last_key,
        first_partial, first_query, N, inner, outer,
        D, DV, BLOCK_D, BLOCK_DV, BM, GROUP, HEADS, SHIFT, CAPPED, UPCAST, False,
    )  # fmt: skip
    if not_finite:  # the same entries again, over what was stored; a loop inside of a branch is not pipelined
        _partials_walk(
            b_k, b_v, q_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, q_t, q_h, first, stop, o_k, last_key,
            first_partial, first_query, N, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BM, GROUP, HEADS, SHIFT, CAPPED, UPCAST, True,
        )  # fmt: skip


@jit
def merged_rows(
    sizes_ptr, first_segment, T, G, N, CHUNK, CHUNKS, TILES, GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS rows of a segment, a row being one head of one query: the query's first entry in the launch, the head in the
    group, the row in a tensor [B, T, H], and which of them are merged: those that exist, and where there are TILES
    tiles of TILE queries for each group, whose tile does not go by its union."""
    o_launch = tl.program_id(1)
    b, g, chunk = segment_place(first_segment + o_launch, CHUNKS, G)
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_q, o_g = o_m // GROUP, o_m % GROUP
    token = chunk * CHUNK + o_q
    m_m = (o_q < CHUNK) & (token < T)
    if TILE > 0:
        m_m = m_m & (tl.load(sizes_ptr + (b * G + g) * TILES + token // TILE, mask=m_m, other=0) < 0)
    return (o_launch.to(tl.int64) * CHUNK + o_q) * N, o_g, ((b * T + token) * G + g) * GROUP + o_g, m_m


@jit
def _merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, sizes_ptr, first_segment, T, G, N, CHUNK, CHUNKS, TILES,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The N partials of a row, weighted by exp2(lse − row_max); all log-sum-exps are read first."""
    o_entry, o_g, o_row, m_m = merged_rows(
        sizes_ptr, first_segment, T, G, N, CHUNK, CHUNKS, TILES, GROUP, TILE, ROWS
    )  # [ROWS]
    if TILE > 0 and tl.max(m_m.to(tl.int32), 0) == 0:
        return
    o_partial = o_entry * GROUP + o_g
    o_n = tl.arange(0, BLOCK_N)
    m_n = m_m[:, None] & (o_n < N)[None, :]  # [ROWS, BLOCK_N]
    b_lses = tl.load(partial_lse_ptr + o_partial[:, None] + o_n[None, :] * GROUP, mask=m_n, other=float("-inf"))
    row_max = tl.max(b_lses, 1)  # [ROWS]
    shift = finite_max(row_max)
    row_sum = tl.sum(tl.exp2(b_lses - shift[:, None]), 1)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for j in range(0, N):
        b_lse = tl.load(partial_lse_ptr + o_partial + j * GROUP, mask=m_m, other=float("-inf"))  # [ROWS]
        b_out = load_rows(partial_ptr, (o_partial + j * GROUP) * DV, b_lse > float("-inf"), DV, BLOCK_DV)
        acc += tl.exp2(b_lse - shift)[:, None] * b_out.to(tl.float32)  # [ROWS, BLOCK_DV]
    out, lse = softmax_output(acc, row_max, row_sum, row_sum == 0.0)
    store_rows(out_ptr, o_row * DV, m_m, out, DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + o_row, lse, mask=m_m)


@jit
def _unfit_kernel(
    k_ptr, v_ptr, bad_ptr, k_b, k_t, k_h, v_b, v_t, v_h, S, K,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block, b, kv_head = tl.program_id(0), (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    last_key = tl.minimum(block * BLOCK + BLOCK, S)
    b_k = load_tile(k_ptr + b * k_b + kv_head * k_h, block * BLOCK, k_t, last_key, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    b_v = load_tile(v_ptr + b * v_b + kv_head * v_h, block * BLOCK, v_t, last_key, BN, DV, BLOCK_DV)
    bad = has_nan(b_k.to(tl.float32) * 0.0).to(tl.int32) + 2 * has_nan(b_v.to(tl.float32) * 0.0).to(tl.int32)
    tl.store(bad_ptr + tl.program_id(1) * tl.num_programs(0) + block, bad.to(tl.int8))


def unfit_blocks(k: Tensor, v: Tensor, blocks: int, constants: dict[str, Any]) -> Tensor:
    """int8 [B, K, blocks]: what of a block is not finite, 1 for keys and 2 for values."""
    (B, S, K, _), names = k.shape, ("D", "DV", "BLOCK_D", "BLOCK_DV", "BN", "BLOCK")
    bad = torch.empty((B, K, blocks), dtype=torch.int8, device=k.device)
    if bad.numel():
        with on_device(k):
            _unfit_kernel[(blocks, B * K)](k, v, bad, *strides(k, v), S, K, **{n: constants[n] for n in names})
    return bad


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ListPlan,
    bounds: tuple[Tensor, Tensor],
    launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor],
    of_tiles: tuple[Tensor | None, int] = (None, 0),
    bad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill ``out`` [B, T, H, Dv] and the log-sum-exp, base 2, [B, T, H]; some segments at a time: partials are few.

    ``of_tiles``: the sizes of unions, whose tiles are left out, and the queries of a tile; ``bad``: ``unfit_blocks``,
    where they are known.
    """
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    if B * T * H == 0:
        return outputs
    cut, width = segments_of(q, v, plan.order.numel(), launch.constants["GROUP"]), v.shape[3]
    items = plan.items.shape[1]
    at_once = segments_at_once(cut.entries * cut.group * width * q.element_size(), cut, K)
    partials = q.new_empty((at_once, cut.entries, cut.group, width))
    partial_lse = outputs[1].new_empty((at_once, cut.entries, cut.group))
    merged = {name: launch.constants[name] for name in ("DV", "BLOCK_DV", "GROUP", "UPCAST")}
    (sizes, tile), place = of_tiles, (T, cut.groups, cut.count, cut.chunk, cut.chunks, ceil_div(T, max(1, of_tiles[1])))
    hopper = for_hopper(plan, launch, q, k, v)
    with on_device(q):
        if hopper and bad is None:
            bad = unfit_blocks(k, v, plan.parts.shape[1] - 1, launch.constants)
        for first, segments in parts_of(cut.segments, at_once):
            partial_lse.fill_(float("-inf"))  # of entries that no list has, and of repeated ones
            if hopper:
                from kernel_index.kernels.sparse.block_sparse_attention import triton_hopper_lists

                part, filled = (first, segments), (partials, partial_lse)
                triton_hopper_lists.partials(q, k, v, plan, bounds, cut, part, bad, launch, filled)
            else:
                _partials_kernel[(items, segments)](
                    q, k, v, plan.order, plan.items, *bounds, partials, partial_lse, *strides(q, k, v),
                    row_stride(bounds[0]), first, S, cut.groups, cut.groups // K, cut.count, items, cut.chunk,
                    cut.chunks, launch.inner, launch.outer, SHIFT=shift_of(cut.count), **launch.constants,
                )  # fmt: skip
            _merge_kernel[(ceil_div(cut.chunk * cut.group, ROWS), segments)](
                partials, partial_lse, *outputs, sizes, first, *place, BLOCK_N=next_power_of_2(cut.count), ROWS=ROWS,
                TILE=tile, **merged,
            )  # fmt: skip
    return outputs
