"""Exact-token attention with the gather inside: a program fetches the picked keys and values of one query itself.

Forward and dQ take one query and all query heads of a key head, over the query's own picks; dK and dV one key, over the
queries that picked it, in their order.  Nothing is staged and nothing is summed by atomics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import LOG2E, dot, load_rows, narrow, store_rows, tanh
from kernel_index.core.triton.launch import interpreting, next_power_of_2, on_device


@triton.jit
def _selection(picks_ptr, counts_ptr, b, own, t, T, K, PICKS, SHARED: tl.constexpr):
    """Where a query's picks begin, and how many there are."""
    at = b * T + t if SHARED else (b * T + t) * K + own
    return picks_ptr + at * PICKS, tl.load(counts_ptr + at)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, picks_ptr, counts_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, PICKS, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    b, own = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    picks, count = _selection(picks_ptr, counts_ptr, b, own, t, T, K, PICKS, SHARED)
    group = tl.arange(0, BG)
    head = (own * G + group).to(tl.int64)
    q = load_rows(q_ptr + b * q_b + t * q_t, head * q_h, group < G, D, BLOCK_D)
    k_base, v_base = k_ptr + b * k_b + own * k_h, v_ptr + b * v_b + own * v_h
    acc = tl.zeros((BG, BLOCK_DV), tl.float32)
    m = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    for at in range(0, count, BN):
        place = at + tl.arange(0, BN)
        row = tl.load(picks + place, mask=place < count, other=-1)
        some = row >= 0
        row = tl.where(some, row, 0).to(tl.int64)
        k = load_rows(k_base, row * k_t, some, D, BLOCK_D)
        z = dot(q, tl.trans(k), UPCAST)
        if CAPPED:
            z = tanh(z * inner)
        z = tl.where(some[None, :], z * outer, float("-inf"))
        new_m = tl.maximum(m, tl.max(z, 1))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(z - safe_m[:, None])
        shrink = tl.exp2(m - safe_m)
        v = load_rows(v_base, row * v_t, some, DV, BLOCK_DV)
        acc = acc * shrink[:, None] + dot(narrow(p, v.dtype, UPCAST), v, UPCAST)
        m, total = new_m, total * shrink + tl.sum(p, 1)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_at = (b * T + t) * K * G + head
    store_rows(out_ptr, out_at * DV, group < G, acc / total[:, None], DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + out_at, tl.where(empty, float("-inf"), m + tl.log2(total)), mask=group < G)


@triton.jit
def _queries_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, picks_ptr, counts_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, PICKS, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    b, own = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    picks, count = _selection(picks_ptr, counts_ptr, b, own, t, T, K, PICKS, SHARED)
    group = tl.arange(0, BG)
    head = (own * G + group).to(tl.int64)
    out_at = (b * T + t) * K * G + head
    d_out = load_rows(d_out_ptr + b * g_b + t * g_t, head * g_h, group < G, DV, BLOCK_DV)
    out = load_rows(out_ptr, out_at * DV, group < G, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + out_at, delta, mask=group < G)
    lse = tl.load(lse_ptr + out_at, mask=group < G, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # exp2(z − ∞) = 0: what a query without keys sends back
    q = load_rows(q_ptr + b * q_b + t * q_t, head * q_h, group < G, D, BLOCK_D)
    k_base, v_base = k_ptr + b * k_b + own * k_h, v_ptr + b * v_b + own * v_h
    dq = tl.zeros((BG, BLOCK_D), tl.float32)
    for at in range(0, count, BN):
        place = at + tl.arange(0, BN)
        row = tl.load(picks + place, mask=place < count, other=-1)
        some = row >= 0
        row = tl.where(some, row, 0).to(tl.int64)
        k = load_rows(k_base, row * k_t, some, D, BLOCK_D)
        z = dot(q, tl.trans(k), UPCAST)
        if CAPPED:
            z = tanh(z * inner)
        p = tl.where(some[None, :], tl.exp2(z * outer - lse[:, None]), 0.0)
        v = load_rows(v_base, row * v_t, some, DV, BLOCK_DV)
        dz = p * (dot(d_out, tl.trans(v), UPCAST) - delta[:, None])
        if CAPPED:
            dz = dz * (1.0 - z * z)
        dq += dot(narrow(dz, k.dtype, UPCAST), k, UPCAST)
    store_rows(dq_ptr, out_at * D, group < G, dq * scale, D, BLOCK_D, UPCAST)


@triton.jit
def _keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, queries_ptr, first_ptr, dk_ptr, dv_ptr,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, S, K, G, PICKS, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BR: tl.constexpr,
    SHARED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A row is one query with one head.  Products with a single key are sums over the head, in float32."""
    s = tl.program_id(0).to(tl.int64)
    b, own = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    selection = b if SHARED else b * K + own
    first = tl.load(first_ptr + selection * (S + 1) + s)
    last = tl.load(first_ptr + selection * (S + 1) + s + 1)
    queries_ptr += selection * T * PICKS + first
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k = tl.load(k_ptr + b * k_b + s * k_t + own * k_h + column, mask=column < D, other=0.0).to(tl.float32)
    v_at = v_ptr + b * v_b + s * v_t + own * v_h + value_column
    v = tl.load(v_at, mask=value_column < DV, other=0.0).to(tl.float32)
    dk = tl.zeros((BLOCK_D,), tl.float32)
    dv = tl.zeros((BLOCK_DV,), tl.float32)
    rows = ((last - first) * G).to(tl.int32)
    for at in range(0, rows, BR):
        row = at + tl.arange(0, BR)
        exists = row < rows
        t = tl.load(queries_ptr + row // G, mask=exists, other=0).to(tl.int64)
        head = (own * G + row % G).to(tl.int64)
        q = load_rows(q_ptr + b * q_b, t * q_t + head * q_h, exists, D, BLOCK_D).to(tl.float32)
        d_out = load_rows(d_out_ptr + b * g_b, t * g_t + head * g_h, exists, DV, BLOCK_DV).to(tl.float32)
        at_row = (b * T + t) * K * G + head
        lse = tl.load(lse_ptr + at_row, mask=exists, other=float("inf"))
        delta = tl.load(delta_ptr + at_row, mask=exists, other=0.0)
        z = tl.sum(q * k[None, :], 1)
        if CAPPED:
            z = tanh(z * inner)
        p = tl.exp2(z * outer - lse)
        dz = p * (tl.sum(d_out * v[None, :], 1) - delta)
        if CAPPED:
            dz = dz * (1.0 - z * z)
        dk += tl.sum(dz[:, None] * q, 0)
        dv += tl.sum(p[:, None] * d_out, 0)
    at_key = (b * S + s) * K + own
    dk = narrow(dk * scale, dk_ptr.dtype.element_ty, UPCAST)
    tl.store(dk_ptr + at_key * D + column, dk, mask=column < D)
    dv = narrow(dv, dv_ptr.dtype.element_ty, UPCAST)
    tl.store(dv_ptr + at_key * DV + value_column, dv, mask=value_column < DV)


class Config(NamedTuple):
    """Picks of a step, rows of a step over a key's queries, warps, stages of the software pipeline."""

    picks: int
    rows: int
    num_warps: int
    num_stages: int


def pick_config(width: int, element_bytes: int) -> Config:
    """The geometry from the larger head size alone; not tuned on a device.

    Compiled ahead of time for sm_90 and sm_100 it spills no register, but for dQ in float32 above a head size of 128.
    """
    if element_bytes == 4:
        return Config(32, 32, 4, 1) if width <= 64 else Config(16, 16, 8, 1)
    if width <= 64:
        return Config(64, 64, 4, 2)
    return Config(32, 32, 4, 2) if width <= 128 else Config(16, 16, 4, 1)


class _Launch(NamedTuple):
    config: Config
    constants: dict[str, Any]
    scale: float
    inner: float
    outer: float


def _launch_of(q: Tensor, v: Tensor, scale: float, softcap: float, shared: bool) -> _Launch:
    width, value_width = q.shape[3], v.shape[3]
    config = Config(16, 16, 4, 1) if interpreting() else pick_config(max(width, value_width), q.element_size())
    blocks = {"BLOCK_D": max(16, next_power_of_2(width)), "BLOCK_DV": max(16, next_power_of_2(value_width))}
    flags = {"SHARED": shared, "CAPPED": softcap > 0, "UPCAST": interpreting()}
    geometry = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    inner, outer = (scale / softcap, softcap * LOG2E.value) if softcap > 0 else (0.0, scale * LOG2E.value)
    return _Launch(config, {"D": width, "DV": value_width, **blocks, **flags, **geometry}, scale, inner, outer)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, counts: Tensor, scale: float, softcap: float,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), K = q.shape, k.shape[2]
    how = _launch_of(q, v, scale, softcap, places.shape[2] == 1)
    if B * T * H:
        with on_device(q):
            _forward_kernel[(T, B * K)](
                q, k, v, places, counts, *outputs, *_strides(q, k, v), T, K, H // K, places.shape[3],
                how.inner, how.outer, BG=max(16, next_power_of_2(H // K)), BN=how.config.picks, **how.constants,
            )  # fmt: skip
    return outputs


def backward_queries(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, places: Tensor, counts: Tensor,
    scale: float, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), K = q.shape, k.shape[2]
    how = _launch_of(q, v, scale, softcap, places.shape[2] == 1)
    if B * T * H:
        with on_device(q):
            _queries_kernel[(T, B * K)](
                d_out, q, k, v, places, counts, out, lse, *outputs, *_strides(d_out, q, k, v), T, K, H // K,
                places.shape[3], how.scale, how.inner, how.outer, BG=max(16, next_power_of_2(H // K)),
                BN=how.config.picks, **how.constants,
            )  # fmt: skip
    return outputs


def backward_keys(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, queries: Tensor, first: Tensor,
    scale: float, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    how = _launch_of(q, v, scale, softcap, queries.shape[1] == 1)
    if B * S * K:
        with on_device(q):
            _keys_kernel[(S, B * K)](
                d_out, q, k, v, lse, delta, queries, first, *outputs, *_strides(d_out, q, k, v), T, S, K, H // K,
                queries.shape[2] // max(1, T), how.scale, how.inner, how.outer, BR=how.config.rows, **how.constants,
            )  # fmt: skip
    return outputs
