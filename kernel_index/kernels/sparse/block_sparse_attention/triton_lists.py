"""Forward by key block: a partial output and log-sum-exp for every selected block, then one pass that merges a row's.

A program holds one block's keys and values and visits a part of the list of queries that selected it.  Since each row
of a product has selected the block, no product is wasted; the cost is that partials are written and read once.  Names
and units are those of ``core/triton/attention.py``; a row is one query of one head, an entry one selected block of it.
"""

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
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan, heads_at_once, parts_of

ROWS = 16
"""Rows of a program that merges partials."""


@jit
def load_entries(p_order, o_n, stop, N):
    """Entries of a list as (index into ``selected``, row, whether it counts); not if it repeats the row before it."""
    m_listed = o_n < stop
    b_entry = tl.load(p_order + o_n, mask=m_listed, other=0)  # [BM]
    b_before = tl.load(p_order + o_n - 1, mask=m_listed & (o_n > 0), other=-1)  # [BM]
    o_row = b_entry // N
    return b_entry, o_row, m_listed & ((b_before < 0) | (b_before // N != o_row))


@jit
def load_part(p_items, head, M):
    """Of one part of a list: its block, where the list begins, and where the part begins and ends in the list."""
    p_item = p_items + (head.to(tl.int64) * M + tl.program_id(0)) * 4
    block = tl.load(p_item).to(tl.int32)
    begin = tl.load(p_item + 1)
    return block, begin, (tl.load(p_item + 2) - begin).to(tl.int32), (tl.load(p_item + 3) - begin).to(tl.int32)


@jit
def _partials_walk(
    b_k, b_v, q_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, q_t, first, stop, o_k, last_key, first_partial,
    T, H, N, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The entries ``first`` to ``stop`` of a list; pointers are to the batch row and head."""
    for i in range(first, stop, BM):
        b_entry, o_row, m_m = load_entries(order_ptr, i + tl.arange(0, BM), stop, N)  # [BM]
        token = (o_row // H) % T
        start = tl.load(start_ptr + token, mask=m_m, other=0)  # [BM]
        end = tl.minimum(tl.load(end_ptr + token, mask=m_m, other=0), last_key)  # [BM]
        b_q = load_rows(q_ptr, token.to(tl.int64) * q_t, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
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
        o_partial = first_partial + token.to(tl.int64) * N + (b_entry - o_row * N)
        store_rows(out_ptr, o_partial * DV, m_m, out, DV, BLOCK_DV, UPCAST)
        tl.store(lse_ptr + o_partial, lse, mask=m_m)


@jit
def _partials_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, items_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, first_head, T, S, H, G, N, M, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One part of one of the M parts of a head's lists; a row has N entries, each with its own partial."""
    o_launch = tl.program_id(1)
    head = first_head + o_launch
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    block, begin, first, stop = load_part(items_ptr, head, M)
    order_ptr += begin
    first_key = block * BLOCK
    last_key = tl.minimum(first_key + BLOCK, S)
    kv_head = h // G
    b_k = load_tile(k_ptr + b * k_b + kv_head * k_h, first_key, k_t, last_key, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    b_v = load_tile(v_ptr + b * v_b + kv_head * v_h, first_key, v_t, last_key, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    o_k = first_key + tl.arange(0, BN)  # [BN]
    q_ptr += b * q_b + h * q_h
    start_ptr += b * window_b
    end_ptr += b * window_b
    first_partial = o_launch.to(tl.int64) * T * N
    not_finite = has_nan(b_v.to(tl.float32) * 0.0)  # a value of this block
    _partials_walk(
        b_k, b_v, q_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, q_t, first, stop, o_k, last_key,
        first_partial, T, H, N, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, CAPPED, UPCAST, False,
    )  # fmt: skip
    if not_finite:  # the same entries again, over what was stored; a loop inside of a branch is not pipelined
        _partials_walk(
            b_k, b_v, q_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, q_t, first, stop, o_k, last_key,
            first_partial, T, H, N, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, CAPPED, UPCAST, True,
        )  # fmt: skip


@jit
def _merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, first_head, T, H, N,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The N partials of a row, weighted by exp2(lse − row_max); all log-sum-exps are read first."""
    o_launch = tl.program_id(1)
    head = first_head + o_launch
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_m = token < T
    o_partial = (o_launch.to(tl.int64) * T + token) * N
    o_n = tl.arange(0, BLOCK_N)
    m_n = m_m[:, None] & (o_n < N)[None, :]  # [ROWS, BLOCK_N]
    b_lses = tl.load(partial_lse_ptr + o_partial[:, None] + o_n[None, :], mask=m_n, other=float("-inf"))
    row_max = tl.max(b_lses, 1)  # [ROWS]
    shift = finite_max(row_max)
    row_sum = tl.sum(tl.exp2(b_lses - shift[:, None]), 1)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for j in range(0, N):
        b_lse = tl.load(partial_lse_ptr + o_partial + j, mask=m_m, other=float("-inf"))  # [ROWS]
        b_out = load_rows(partial_ptr, (o_partial + j) * DV, b_lse > float("-inf"), DV, BLOCK_DV)  # [ROWS, BLOCK_DV]
        acc += tl.exp2(b_lse - shift)[:, None] * b_out.to(tl.float32)
    out, lse = softmax_output(acc, row_max, row_sum, row_sum == 0.0)
    o_row = (b * T + token) * H + h
    store_rows(out_ptr, o_row * DV, m_m, out, DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + o_row, lse, mask=m_m)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ListPlan,
    bounds: tuple[Tensor, Tensor],
    launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill ``out`` [B, T, H, Dv] and the log-sum-exp, base 2, [B, T, H]; some heads at a time, so partials are few."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    if B * T * H == 0:
        return outputs
    count, width, items = plan.order.numel() // (B * T * H), v.shape[3], plan.items.shape[1]
    at_once = heads_at_once(T * count * width * q.element_size(), H, K, B)
    partials = q.new_empty((at_once, T, count, width))
    partial_lse = outputs[1].new_empty((at_once, T, count))
    merged = {name: launch.constants[name] for name in ("DV", "BLOCK_DV", "UPCAST")}
    with on_device(q):
        for first, heads in parts_of(B * H, at_once):
            partial_lse.fill_(float("-inf"))  # of entries that no list has, and of repeated ones
            _partials_kernel[(items, heads)](
                q, k, v, plan.order, plan.items, *bounds, partials, partial_lse, *strides(q, k, v),
                row_stride(bounds[0]), first, T, S, H, H // K, count, items, launch.inner, launch.outer,
                **launch.constants,
            )  # fmt: skip
            _merge_kernel[(ceil_div(T, ROWS), heads)](
                partials, partial_lse, *outputs, first, T, H, count, BLOCK_N=next_power_of_2(count), ROWS=ROWS, **merged
            )
    return outputs
