"""Forward by key block: a partial output and log-sum-exp for every pick, then one pass that joins those of a row.

A program holds one block's keys and values and goes over a part of the list of queries that picked it.  Since each row
of a product has picked the block, nothing is wasted; what it costs is the partials' way to memory and back.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import dot, load_rows, load_tile, narrow, store_rows, tanh
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device
from kernel_index.kernels.sparse.block_sparse_attention.geometry import row_stride, strides
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListLaunch, ListPlan, heads_at_once, parts_of

ROWS = 16
"""Rows of a program that joins partials."""


@triton.jit
def load_picks(order_ptr, place, stop, N):
    """Picks of a list as (place in ``selected``, row, whether it counts); not if it repeats the row before it."""
    listed = place < stop
    pick = tl.load(order_ptr + place, mask=listed, other=0)
    before = tl.load(order_ptr + place - 1, mask=listed & (place > 0), other=-1)
    row = pick // N
    return pick, row, listed & ((before < 0) | (before // N != row))


@triton.jit
def _partials_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, items_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b, first_head, T, S, H, GROUPS, N, M, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(1)
    head = first_head + here
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    item = items_ptr + (head.to(tl.int64) * M + tl.program_id(0)) * 4
    block = tl.load(item).to(tl.int32)
    begin = tl.load(item + 1)
    order_ptr += begin
    first, stop = (tl.load(item + 2) - begin).to(tl.int32), (tl.load(item + 3) - begin).to(tl.int32)
    at = block * BLOCK
    last = tl.minimum(at + BLOCK, S)
    own = h // GROUPS
    k = load_tile(k_ptr + b * k_b + own * k_h, at, k_t, last, BN, D, BLOCK_D)
    v = load_tile(v_ptr + b * v_b + own * v_h, at, v_t, last, BN, DV, BLOCK_DV)
    key = at + tl.arange(0, BN)
    q_ptr += b * q_b + h * q_h
    start_ptr += b * interval_b
    end_ptr += b * interval_b
    for i in range(first, stop, BM):
        pick, row, exists = load_picks(order_ptr, i + tl.arange(0, BM), stop, N)
        token = (row // H) % T
        start = tl.load(start_ptr + token, mask=exists, other=0)
        end = tl.minimum(tl.load(end_ptr + token, mask=exists, other=0), last)
        q = load_rows(q_ptr, token.to(tl.int64) * q_t, exists, D, BLOCK_D)
        z = dot(q, tl.trans(k), UPCAST)
        if CAPPED:
            z = tanh(z * inner)
        z = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), z * outer, float("-inf"))
        m = tl.max(z, 1)
        p = tl.exp2(z - tl.where(m == float("-inf"), 0.0, m)[:, None])
        total = tl.sum(p, 1)
        empty = total == 0.0
        out = dot(narrow(p, v.dtype, UPCAST), v, UPCAST) / tl.where(empty, 1.0, total)[:, None]
        slot = (here.to(tl.int64) * T + token) * N + (pick - row * N)
        store_rows(out_ptr, slot * DV, exists, out, DV, BLOCK_DV, UPCAST)
        tl.store(lse_ptr + slot, tl.where(empty, float("-inf"), m + tl.log2(total)), mask=exists)


@triton.jit
def _join_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, first_head, T, H, N,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, PICKS: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(1)
    head = first_head + here
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token < T
    slot = (here.to(tl.int64) * T + token) * N
    nth = tl.arange(0, PICKS)
    lses = tl.load(
        part_lse_ptr + slot[:, None] + nth[None, :], mask=exists[:, None] & (nth < N)[None, :], other=float("-inf")
    )
    m = tl.max(lses, 1)
    safe = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp2(lses - safe[:, None]), 1)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for j in range(0, N):
        lse = tl.load(part_lse_ptr + slot + j, mask=exists, other=float("-inf"))
        part = load_rows(parts_ptr, (slot + j) * DV, lse > float("-inf"), DV, BLOCK_DV)
        acc += tl.exp2(lse - safe)[:, None] * part.to(tl.float32)
    row = (b * T + token) * H + h
    store_rows(out_ptr, row * DV, exists, acc / total[:, None], DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), m + tl.log2(total)), mask=exists)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ListPlan,
    bounds: tuple[Tensor, Tensor],
    how: ListLaunch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill ``out`` [B, T, H, Dv] and the log-sum-exp, base 2, [B, T, H]; some heads at a time, so partials are few."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    if B * T * H == 0:
        return outputs
    picks, width, items = plan.order.numel() // (B * T * H), v.shape[3], plan.items.shape[1]
    at_once = heads_at_once(T * picks * width * q.element_size(), H, K, B)
    parts = q.new_empty((at_once, T, picks, width))
    part_lse = outputs[1].new_empty((at_once, T, picks))
    names = ("DV", "BLOCK_DV", "UPCAST")
    joined = {name: how.constants[name] for name in names} | {"PICKS": next_power_of_2(picks), "ROWS": ROWS}
    with on_device(q):
        for first, heads in parts_of(B * H, at_once):
            part_lse.fill_(float("-inf"))  # of picks that no list has, and of repeated ones
            _partials_kernel[(items, heads)](
                q, k, v, plan.order, plan.items, *bounds, parts, part_lse, *strides(q, k, v), row_stride(bounds[0]),
                first, T, S, H, H // K, picks, items, how.inner, how.outer, **how.constants,
            )  # fmt: skip
            _join_kernel[(ceil_div(T, ROWS), heads)](parts, part_lse, *outputs, first, T, H, picks, **joined)
    return outputs
