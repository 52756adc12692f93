"""Backward by key block: one pass over the lists makes dK, dV and, for every pick, a part of dQ.

Parts are joined in a fixed order, never by atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import dot, load_rows, load_tile, narrow, store_rows, tanh
from kernel_index.core.triton.launch import ceil_div, on_device
from kernel_index.kernels.sparse.block_sparse_attention.geometry import row_stride, strides
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListLaunch, ListPlan, heads_at_once, parts_of
from kernel_index.kernels.sparse.block_sparse_attention.triton_lists import ROWS, load_picks


@triton.jit
def _delta_kernel(
    out_ptr, d_out_ptr, d_lse_ptr, delta_ptr, g_b, g_t, g_h, l_b, l_h, l_t, TOKENS, T, H,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_D_LSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < TOKENS.to(tl.int64) * H
    h, token = row % H, row // H
    b, t = token // T, token % T
    out = load_rows(out_ptr, row * DV, exists, DV, BLOCK_DV).to(tl.float32)
    d_out = load_rows(d_out_ptr, b * g_b + t * g_t + h * g_h, exists, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * d_out, 1)
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + b * l_b + h * l_h + t * l_t, mask=exists, other=0.0)
    tl.store(delta_ptr + row, delta, mask=exists)


@triton.jit
def _lists_step(
    dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, end_ptr, dq_ptr, live_ptr, i, stop, key,
    last, base, q_t, g_t, T, H, N, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    pick, row, exists = load_picks(order_ptr, i + tl.arange(0, BM), stop, N)
    token = (row // H) % T
    start = tl.load(start_ptr + token, mask=exists, other=0)
    end = tl.minimum(tl.load(end_ptr + token, mask=exists, other=0), last)
    lse = tl.load(lse_ptr + row, mask=exists, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # exp2(z − ∞) = 0: what a query without keys sends back
    delta = tl.load(delta_ptr + row, mask=exists, other=0.0)
    q = load_rows(q_ptr, token.to(tl.int64) * q_t, exists, D, BLOCK_D)
    d_out = load_rows(d_out_ptr, token.to(tl.int64) * g_t, exists, DV, BLOCK_DV)
    z = dot(k, tl.trans(q), UPCAST)  # transposed throughout: [keys, rows]
    if CAPPED:
        z = tanh(z * inner)
    p = tl.exp2(z * outer - lse[None, :])
    p = tl.where((key[:, None] >= start[None, :]) & (key[:, None] < end[None, :]), p, 0.0)
    dv += dot(narrow(p, d_out.dtype, UPCAST), d_out, UPCAST)
    dz = p * (dot(v, tl.trans(d_out), UPCAST) - delta[None, :])
    if CAPPED:
        dz = dz * (1.0 - z * z)
    dz = narrow(dz, q.dtype, UPCAST)
    dk += dot(dz, q, UPCAST)
    slot = base + token.to(tl.int64) * N + (pick - row * N)
    store_rows(dq_ptr, slot * D, exists, dot(tl.trans(dz), k, UPCAST) * scale, D, BLOCK_D, UPCAST)
    tl.store(live_ptr + slot, tl.full((BM,), 1, tl.int8), mask=exists)
    return dk, dv


@triton.jit
def _lists_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, order_ptr, items_ptr, start_ptr, end_ptr, dq_ptr, live_ptr,
    dk_ptr, dv_ptr, g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b, first_head, T, S, H,
    GROUPS, N, M, scale, inner, outer,
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
    if first < stop:
        at = block * BLOCK
        last = tl.minimum(at + BLOCK, S)
        own = h // GROUPS
        k = load_tile(k_ptr + b * k_b + own * k_h, at, k_t, last, BN, D, BLOCK_D)
        v = load_tile(v_ptr + b * v_b + own * v_h, at, v_t, last, BN, DV, BLOCK_DV)
        key = at + tl.arange(0, BN)
        q_ptr += b * q_b + h * q_h
        d_out_ptr += b * g_b + h * g_h
        start_ptr += b * interval_b
        end_ptr += b * interval_b
        dk = tl.zeros((BN, BLOCK_D), tl.float32)
        dv = tl.zeros((BN, BLOCK_DV), tl.float32)
        for i in range(first, stop, BM):
            dk, dv = _lists_step(
                dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, end_ptr, dq_ptr, live_ptr,
                i, stop, key, last, here.to(tl.int64) * T * N, q_t, g_t, T, H, N, scale, inner, outer,
                D, DV, BLOCK_D, BLOCK_DV, BM, CAPPED, UPCAST,
            )  # fmt: skip
        place = (here.to(tl.int64) * M + tl.program_id(0)) * BN + tl.arange(0, BN)
        every = tl.full((BN,), 1, tl.int1)
        store_rows(dk_ptr, place * D, every, dk * scale, D, BLOCK_D, UPCAST)
        store_rows(dv_ptr, place * DV, every, dv, DV, BLOCK_DV, UPCAST)


@triton.jit
def _join_queries_kernel(
    parts_ptr, live_ptr, dq_ptr, first_head, T, H, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(1)
    head = first_head + here
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token < T
    slot = (here.to(tl.int64) * T + token) * N
    dq = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for j in range(0, N):
        live = tl.load(live_ptr + slot + j, mask=exists, other=0) != 0
        dq += load_rows(parts_ptr, (slot + j) * D, live, D, BLOCK_D).to(tl.float32)
    store_rows(dq_ptr, ((b * T + token) * H + h) * D, exists, dq, D, BLOCK_D, UPCAST)


@triton.jit
def _join_keys_kernel(
    dk_parts_ptr, dv_parts_ptr, parts_ptr, dk_ptr, dv_ptr, first_head, S, K, H, BLOCKS, M, TOGETHER,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the parts of ``TOGETHER`` query heads of one key head, in order, to float32 sums."""
    block = tl.program_id(0)
    here = tl.program_id(1) * TOGETHER
    head = first_head + here
    b, own = (head // H).to(tl.int64), ((head % H) // (H // K)).to(tl.int64)
    row = tl.arange(0, BN)
    exists = (row < BLOCK) & (block * BLOCK + row < S)
    at = (b * S + block * BLOCK + row) * K + own
    dk = load_rows(dk_ptr, at * D, exists, D, BLOCK_D)
    dv = load_rows(dv_ptr, at * DV, exists, DV, BLOCK_DV)
    for n in range(0, TOGETHER):
        bounds = parts_ptr + (head + n).to(tl.int64) * (BLOCKS + 1) + block
        for item in range(tl.load(bounds), tl.load(bounds + 1)):
            place = ((here + n).to(tl.int64) * M + item) * BN + row
            dk += load_rows(dk_parts_ptr, place * D, exists, D, BLOCK_D)
            dv += load_rows(dv_parts_ptr, place * DV, exists, DV, BLOCK_DV)
    store_rows(dk_ptr, at * D, exists, dk, D, BLOCK_D, UPCAST)
    store_rows(dv_ptr, at * DV, exists, dv, DV, BLOCK_DV, UPCAST)


def _delta(d_out: Tensor, d_lse: Tensor | None, out: Tensor, widths: dict[str, int]) -> Tensor:
    """[B, T, H]: what is subtracted from the gradient of a probability."""
    B, T, H, _ = out.shape
    delta = torch.empty((B, T, H), dtype=torch.float32, device=out.device)
    _delta_kernel[(ceil_div(B * T * H, ROWS),)](
        out, d_out, d_lse, delta, *strides(d_out, d_out if d_lse is None else d_lse), B * T, T, H,
        HAS_D_LSE=d_lse is not None, ROWS=ROWS, **widths,
    )  # fmt: skip
    return delta


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: ListPlan,
    bounds: tuple[Tensor, Tensor],
    how: ListLaunch,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill dQ, and dK and dV of float32, which begin as zeros; some heads at a time, so that parts are few."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    dq, dk, dv = outputs
    if B * T * H == 0:
        return outputs
    c, DV = how.constants, v.shape[3]
    picks, items, blocks = plan.order.numel() // (B * T * H), plan.items.shape[1], plan.parts.shape[1] - 1
    queries = {name: c[name] for name in ("D", "BLOCK_D", "UPCAST")} | {"ROWS": ROWS}
    keys = {name: c[name] for name in ("D", "DV", "BLOCK_D", "BLOCK_DV", "BN", "BLOCK", "UPCAST")}
    of_head = T * picks * D * q.element_size() + items * c["BN"] * (D + DV) * 4
    at_once = heads_at_once(of_head, H, K, B)
    dq_parts, live = q.new_empty((at_once, T, picks, D)), q.new_empty((at_once, T, picks), dtype=torch.int8)
    dk_parts, dv_parts = dk.new_empty((at_once, items, c["BN"], D)), dk.new_empty((at_once, items, c["BN"], DV))
    with on_device(q):
        delta = _delta(d_out, d_lse, out, {name: c[name] for name in ("DV", "BLOCK_DV")})
        for first, heads in parts_of(B * H, at_once):
            live.zero_()
            _lists_kernel[(items, heads)](
                d_out, q, k, v, lse, delta, plan.order, plan.items, *bounds, dq_parts, live, dk_parts, dv_parts,
                *strides(d_out, q, k, v), row_stride(bounds[0]), first, T, S, H, H // K, picks, items, how.scale,
                how.inner, how.outer, **c,
            )  # fmt: skip
            _join_queries_kernel[(ceil_div(T, ROWS), heads)](dq_parts, live, dq, first, T, H, picks, **queries)
            together = min(heads, H // K)
            if blocks:
                _join_keys_kernel[(blocks, heads // together)](
                    dk_parts, dv_parts, plan.parts, dk, dv, first, S, K, H, blocks, items, together, **keys, num_warps=8
                )
    return outputs
