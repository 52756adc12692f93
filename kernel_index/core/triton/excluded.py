"""Small kernels around a kernel that is not ours: finite keys and values, NaN where others were seen, 0 in padding.

``finite_keys`` copies, once, and notes which keys it changed.  ``mark_rows`` writes NaN to the rows that see one of
these keys, ``clear_after`` 0 to the tokens after the last document; where there are none, which the device alone knows,
their few programs end at once.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors, row_stride, strides

TOKENS, ROWS, KEYS = 32, 64, 128
"""Of a tile of the copy; of a tile of rows, and the keys that it looks at together."""

CLEARED = 4096
"""Elements that are cleared at a time."""


class BadKeys(NamedTuple):
    """Which keys had something that is not finite, int8 [B, K, S], and whether ``some`` had, int32 [1]."""

    bad: Tensor
    some: Tensor


@jit
def _finite_tile(x_ptr, out_ptr, x_t, out_t, o_s, S, D: tl.constexpr, BLOCK_D: tl.constexpr, COPY: tl.constexpr):
    """Reads a tile of one head, and copies it; returns which tokens have an element that is not finite."""
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_tile = (o_s < S)[:, None] & (o_d < D)[None, :]  # [N, BLOCK_D]
    o_s = o_s.to(tl.int64)[:, None]
    b_x = tl.load(x_ptr + o_s * x_t + o_d[None, :], mask=m_tile, other=0.0)
    m_finite = tl.abs(b_x.to(tl.float32)) < float("inf")  # false for NaN, too
    if COPY:
        tl.store(out_ptr + o_s * out_t + o_d[None, :], tl.where(m_finite, b_x, 0.0), mask=m_tile)
    return tl.max(tl.where(m_finite, 0, 1), 1)  # [N]


@jit
def _finite_keys_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, bad_ptr, some_ptr, k_b, k_t, k_h, v_b, v_t, v_h, S, K,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, N: tl.constexpr,
    COPY_K: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one KV head."""
    per_head = tl.cdiv(S, N)
    head = tl.program_id(0) // per_head  # one axis: the second one of a grid ends at 65,535
    b, h = (head // K).to(tl.int64), (head % K).to(tl.int64)
    o_s = (tl.program_id(0) % per_head) * N + tl.arange(0, N)  # [N]
    first = b * S * K + h  # row of the dense copies at token 0
    bad_k = _finite_tile(k_ptr + b * k_b + h * k_h, k_out_ptr + first * D, k_t, K * D, o_s, S, D, BLOCK_D, COPY_K)
    bad_v = _finite_tile(v_ptr + b * v_b + h * v_h, v_out_ptr + first * DV, v_t, K * DV, o_s, S, DV, BLOCK_DV, True)
    bad = tl.maximum(bad_k, bad_v)  # [N]
    tl.store(bad_ptr + (b * K + h) * S + o_s, bad.to(tl.int8), mask=o_s < S)
    if tl.max(bad, 0) > 0:
        tl.store(some_ptr, 1)  # each program that stores at all stores the same


@jit
def _mark_rows_kernel(
    out_ptr, lse_ptr, bad_ptr, some_ptr, start_ptr, end_ptr, q_end_ptr, out_b, out_t, out_h, window_b, q_end_b, tiles,
    T, S, H, G,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LSE: tl.constexpr, IN_TREE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Every program takes each ``num_programs``-th tile of rows of one head."""
    if tl.load(some_ptr) == 0:
        return
    per_head = tl.cdiv(T, BM)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        head, o_q = tile // per_head, (tile % per_head) * BM + tl.arange(0, BM)  # [BM]
        b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
        start = tl.load(start_ptr + b * window_b + o_q, mask=o_q < T, other=0)  # [BM]
        end = tl.load(end_ptr + b * window_b + o_q, mask=o_q < T, other=0)  # [BM]
        m_some = start < end
        low = tl.min(tl.where(m_some, start, S), 0)
        high = tl.max(tl.where(m_some, end, 0), 0)
        p_bad = bad_ptr + (b * (H // G) + h // G) * S
        found = tl.zeros((BM,), tl.int32)
        for s in range(low, high, BN):
            o_k = s + tl.arange(0, BN)  # [BN]
            bad = tl.load(p_bad + o_k, mask=o_k < high, other=0).to(tl.int32)  # [BN]
            m_seen = (o_k[None, :] >= start[:, None]) & (o_k[None, :] < end[:, None])  # [BM, BN]
            if IN_TREE:
                q_end = tl.load(q_end_ptr + b * q_end_b + o_k, mask=o_k < high, other=0)  # [BN]
                m_seen = m_seen & (o_q[:, None] < q_end[None, :])
            found = tl.maximum(found, tl.max(tl.where(m_seen, bad[None, :], 0), 1))
        o_d = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
        nan = tl.full((BM, BLOCK_DV), float("nan"), tl.float32)
        p_out = out_ptr + b * out_b + h * out_h + o_q.to(tl.int64)[:, None] * out_t + o_d[None, :]
        tl.store(p_out, nan.to(out_ptr.dtype.element_ty), mask=(found > 0)[:, None] & (o_d < DV)[None, :])
        if HAS_LSE:
            tl.store(lse_ptr + head.to(tl.int64) * T + o_q, tl.full((BM,), float("nan"), tl.float32), mask=found > 0)


def finite_keys(k: Tensor, v: Tensor, *, copy_k: bool) -> tuple[Tensor, Tensor, BadKeys]:
    """Contiguous copies of k [B, S, K, D] and v [B, S, K, Dv], which have dense columns; 0 for what is not finite.

    Without ``copy_k`` k is read alone, and returned as it is.
    """
    (B, S, K, D), DV = k.shape, v.shape[3]
    copies = k.new_empty(k.shape) if copy_k else k, v.new_empty(v.shape)
    keys = BadKeys(
        torch.empty((B, K, S), dtype=torch.int8, device=k.device),
        torch.zeros(1, dtype=torch.int32, device=k.device),
    )
    with on_device(k):
        _finite_keys_kernel[(ceil_div(S, TOKENS) * B * K,)](
            k, v, *copies, *keys, *strides(k, v), S, K,
            D, DV, next_power_of_2(D), next_power_of_2(DV), TOKENS, copy_k, num_warps=4,
        )  # fmt: skip
    return *copies, keys


def mark_rows(
    out: Tensor, lse: Tensor | None, keys: BadKeys, start: Tensor, end: Tensor, q_end: Tensor | None = None
) -> None:
    """Write NaN, in place, to the rows of out [B, T, H, Dv] and lse [B, H, T] that see one of the keys.

    ``start`` and ``end`` int32 [B or 1, T] bound the keys that a row sees; in a tree row t sees key s only if
    ``t < q_end[s]``, int32 [B or 1, S].
    """
    (B, T, H, DV), (K, S) = out.shape, keys.bad.shape[1:]
    tiles = ceil_div(T, ROWS) * B * H
    with on_device(out):
        _mark_rows_kernel[(min(tiles, processors(out)),)](
            out, lse, keys.bad, keys.some, start, end, q_end, *strides(out), row_stride(start),
            0 if q_end is None else row_stride(q_end), tiles, T, S, H, H // K,
            DV, next_power_of_2(DV), lse is not None, q_end is not None, ROWS, KEYS, num_warps=4,
        )  # fmt: skip


@jit
def _clear_after_kernel(x_ptr, last_ptr, width, size, BLOCK: tl.constexpr):
    """Programs share out what comes after the last token."""
    first = tl.load(last_ptr).to(tl.int64) * width
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first + tl.program_id(0) * BLOCK, size, step):
        o = start + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(x_ptr + o, tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=o < size)


def clear_after(x: Tensor, tokens: Tensor) -> None:
    """Write 0, in place, to the rows of contiguous x [T, …] from ``tokens`` on, an integer on the device."""
    with on_device(x):
        _clear_after_kernel[(processors(x),)](
            x, tokens, x.numel() // max(1, x.shape[0]), x.numel(), CLEARED, num_warps=4
        )
