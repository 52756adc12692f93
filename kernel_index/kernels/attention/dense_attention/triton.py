"""Attention by intervals: tiles outside a query's interval are never visited, those inside all of them need no mask.

Forward and dQ go by tiles of queries over the keys, dK and dV by tiles of keys over the queries, so that nothing is
summed by atomics.  Exponentials and the log-sum-exp are base 2; ``outer`` carries log2(e).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.attention import LOG2E, dot, load_tile, masked_step, narrow, plan_steps, store_tile, tanh
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2, on_device


@triton.jit
def _forward_step(
    acc, m, total, q, k_base, v_base, k_stride, v_stride, at, start, end, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = at + tl.arange(0, BN)
    k = load_tile(k_base, at, k_stride, S, BN, D, BLOCK_D)
    z = dot(q, tl.trans(k), UPCAST)
    if CAPPED:
        z = tanh(z * inner)
    z = z * outer
    if MASKED:
        z = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), z, float("-inf"))
    new_m = tl.maximum(m, tl.max(z, 1))
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(z - safe_m[:, None])
    shrink = tl.exp2(m - safe_m)
    v = load_tile(v_base, at, v_stride, S, BN, DV, BLOCK_DV)
    acc = acc * shrink[:, None] + dot(narrow(p, v.dtype, UPCAST), v, UPCAST)
    return acc, new_m, total * shrink + tl.sum(p, 1)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b, T, S, H, G, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, HAS_SINK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the long rows of a causal mask begin first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    start_ptr += b * interval_b
    end_ptr += b * interval_b
    row = first + tl.arange(0, BM)
    start = tl.load(start_ptr + row, mask=row < T, other=0)
    end = tl.load(end_ptr + row, mask=row < T, other=0)
    low, left, full, right = plan_steps(start_ptr, end_ptr, first, T, BM, BN)
    q = load_tile(q_ptr + b * q_b + h * q_h, first, q_t, T, BM, D, BLOCK_D)
    k_base, v_base = k_ptr + b * k_b + (h // G) * k_h, v_ptr + b * v_b + (h // G) * v_h
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for i in range(0, full):
        acc, m, total = _forward_step(
            acc, m, total, q, k_base, v_base, k_t, v_t, (low + left + i) * BN, start, end, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, False,
        )  # fmt: skip
    for i in range(0, left + right):
        at = masked_step(i, low, left, full, BN)
        acc, m, total = _forward_step(
            acc, m, total, q, k_base, v_base, k_t, v_t, at, start, end, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, True,
        )  # fmt: skip
    empty = start >= end
    if HAS_SINK:  # it joins the denominator of every query that has a key
        sink = tl.load(sink_ptr + h).to(tl.float32) * LOG2E
        new_m = tl.where(empty, 0.0, tl.maximum(m, sink))
        shrink = tl.exp2(m - new_m)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - new_m)
        m = new_m
    total = tl.where(empty, 1.0, total)
    out = acc / total[:, None]
    lse = tl.where(empty, float("-inf"), m + tl.log2(total))
    store_tile(out_ptr + (b * T * H + h) * DV, first, H * DV, out, T, BM, DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + (b * H + h) * T + row, lse, mask=row < T)


@triton.jit
def _queries_step(
    dq, q, d_out, lse, delta, k_base, v_base, k_stride, v_stride, at, start, end, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = at + tl.arange(0, BN)
    k = load_tile(k_base, at, k_stride, S, BN, D, BLOCK_D)
    z = dot(q, tl.trans(k), UPCAST)
    if CAPPED:
        z = tanh(z * inner)
    p = tl.exp2(z * outer - lse[:, None])
    if MASKED:
        p = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    v = load_tile(v_base, at, v_stride, S, BN, DV, BLOCK_DV)
    dz = p * (dot(d_out, tl.trans(v), UPCAST) - delta[:, None])
    if CAPPED:
        dz = dz * (1.0 - z * z)
    return dq + dot(narrow(dz, k.dtype, UPCAST), k, UPCAST)


@triton.jit
def _queries_kernel(
    d_out_ptr, d_lse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, end_ptr, dq_ptr, delta_ptr,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b, T, S, H, G, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, HAS_D_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    start_ptr += b * interval_b
    end_ptr += b * interval_b
    row = first + tl.arange(0, BM)
    start = tl.load(start_ptr + row, mask=row < T, other=0)
    end = tl.load(end_ptr + row, mask=row < T, other=0)
    low, left, full, right = plan_steps(start_ptr, end_ptr, first, T, BM, BN)
    d_out = load_tile(d_out_ptr + b * g_b + h * g_h, first, g_t, T, BM, DV, BLOCK_DV)
    out = load_tile(out_ptr + (b * T * H + h) * DV, first, H * DV, T, BM, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    at_row = (b * H + h) * T + row
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + at_row, mask=row < T, other=0.0)
    delta = tl.where(start < end, delta, 0.0)
    tl.store(delta_ptr + at_row, delta, mask=row < T)
    lse = tl.load(lse_ptr + at_row, mask=row < T, other=0.0)
    lse = tl.where(start < end, lse, float("inf"))  # exp2(z − ∞) = 0: what a query without keys sends back
    q = load_tile(q_ptr + b * q_b + h * q_h, first, q_t, T, BM, D, BLOCK_D)
    k_base, v_base = k_ptr + b * k_b + (h // G) * k_h, v_ptr + b * v_b + (h // G) * v_h
    dq = tl.zeros((BM, BLOCK_D), tl.float32)
    for i in range(0, full):
        dq = _queries_step(
            dq, q, d_out, lse, delta, k_base, v_base, k_t, v_t, (low + left + i) * BN, start, end, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, False,
        )  # fmt: skip
    for i in range(0, left + right):
        at = masked_step(i, low, left, full, BN)
        dq = _queries_step(
            dq, q, d_out, lse, delta, k_base, v_base, k_t, v_t, at, start, end, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, True,
        )  # fmt: skip
    store_tile(dq_ptr + (b * T * H + h) * D, first, H * D, dq * scale, T, BM, D, BLOCK_D, UPCAST)


@triton.jit
def _keys_step(
    dk, dv, k, v, q_base, d_out_base, lse_base, delta_base, q_stride, g_stride, at, start, end, T, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = at + tl.arange(0, BM)
    q = load_tile(q_base, at, q_stride, T, BM, D, BLOCK_D)
    lse = tl.load(lse_base + row, mask=row < T, other=0.0)
    delta = tl.load(delta_base + row, mask=row < T, other=0.0)
    z = dot(k, tl.trans(q), UPCAST)  # transposed throughout: [keys, queries]
    if CAPPED:
        z = tanh(z * inner)
    p = tl.exp2(z * outer - lse[None, :])
    if MASKED:
        p = tl.where((row[None, :] >= start[:, None]) & (row[None, :] < end[:, None]), p, 0.0)
    d_out = load_tile(d_out_base, at, g_stride, T, BM, DV, BLOCK_DV)
    dv += dot(narrow(p, d_out.dtype, UPCAST), d_out, UPCAST)
    dz = p * (dot(v, tl.trans(d_out), UPCAST) - delta[None, :])
    if CAPPED:
        dz = dz * (1.0 - z * z)
    return dk + dot(narrow(dz, q.dtype, UPCAST), q, UPCAST), dv


@triton.jit
def _keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, start_ptr, end_ptr, dk_ptr, dv_ptr,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b, T, S, H, G, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    K = H // G
    b, own = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    start_ptr += b * interval_b
    end_ptr += b * interval_b
    key = first + tl.arange(0, BN)
    start = tl.load(start_ptr + key, mask=key < S, other=0)
    end = tl.load(end_ptr + key, mask=key < S, other=0)
    low, left, full, right = plan_steps(start_ptr, end_ptr, first, S, BN, BM)
    k = load_tile(k_ptr + b * k_b + own * k_h, first, k_t, S, BN, D, BLOCK_D)
    v = load_tile(v_ptr + b * v_b + own * v_h, first, v_t, S, BN, DV, BLOCK_DV)
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    for g in range(0, G):
        h = own * G + g
        q_base, d_out_base = q_ptr + b * q_b + h * q_h, d_out_ptr + b * g_b + h * g_h
        lse_base, delta_base = lse_ptr + (b * H + h) * T, delta_ptr + (b * H + h) * T
        for i in range(0, full):
            dk, dv = _keys_step(
                dk, dv, k, v, q_base, d_out_base, lse_base, delta_base, q_t, g_t, (low + left + i) * BM, start, end, T,
                inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, CAPPED, UPCAST, False,
            )  # fmt: skip
        for i in range(0, left + right):
            at = masked_step(i, low, left, full, BM)
            dk, dv = _keys_step(
                dk, dv, k, v, q_base, d_out_base, lse_base, delta_base, q_t, g_t, at, start, end, T,
                inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, CAPPED, UPCAST, True,
            )  # fmt: skip
    store_tile(dk_ptr + (b * S * K + own) * D, first, K * D, dk * scale, S, BN, D, BLOCK_D, UPCAST)
    store_tile(dv_ptr + (b * S * K + own) * DV, first, K * DV, dv, S, BN, DV, BLOCK_DV, UPCAST)


class Config(NamedTuple):
    """Rows of a tile, rows of a step, warps, stages of the software pipeline."""

    tile: int
    step: int
    num_warps: int
    num_stages: int


def pick_config(kernel: str, width: int, element_bytes: int, target: Target) -> Config:
    """The geometry for ``forward``, ``queries`` or ``keys``, from the larger head size alone.

    The fastest that spill no register on sm_90 and sm_100 without a softcap; timed on an H200, T = 16384, causal.
    """
    if element_bytes == 4:  # no tensor cores in full float32: small tiles keep the accumulators in registers
        return Config(64, 32, 4, 1) if width <= 64 else Config(32, 16, 4, 1)
    if width > 128:
        return Config(64, 32, 4, 2) if kernel == "forward" else Config(32, 32, 4, 1)
    hopper, roomy = target.arch == 90, target.arch in (90, 100)  # roomy: 227 KiB of shared memory
    stages = 3 if roomy or target.arch == 80 else 2
    if kernel == "forward" or (kernel == "queries" and width <= 64):
        return Config(64, 64, 4, stages)
    if kernel == "queries":
        return Config(128, 64, 8, 3 if hopper else 2) if roomy else Config(64, 32, 4, 1)
    if width <= 64:
        return Config(64, 64, 4, 2) if hopper else Config(64, 32, 4, 2)
    return Config(128, 32, 8, 1) if roomy else Config(32, 32, 4, 1)


class _Launch(NamedTuple):
    """What the three launches share."""

    config: Config
    constants: dict[str, Any]
    interval_b: int
    scale: float
    inner: float
    outer: float


def _launch_of(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, rows: int, start: Tensor, scale: float | None, softcap: float
) -> _Launch:
    width, value_width = q.shape[3], v.shape[3]
    scale = width**-0.5 if scale is None else scale
    if interpreting():
        config = Config(16, 16, 4, 1)
    else:
        config = pick_config(kernel, max(width, value_width), q.element_size(), target_of(q.device))
    tile = min(config.tile, max(16, next_power_of_2(rows)))  # few queries: no wider than they are
    blocks = {"BLOCK_D": max(16, next_power_of_2(width)), "BLOCK_DV": max(16, next_power_of_2(value_width))}
    geometry = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    constants = {"D": width, "DV": value_width, **blocks, "CAPPED": softcap > 0, "UPCAST": interpreting(), **geometry}
    inner, outer = (scale / softcap, softcap * LOG2E.value) if softcap > 0 else (0.0, scale * LOG2E.value)
    interval_b = 0 if start.shape[0] == 1 else start.shape[1]
    return _Launch(config._replace(tile=tile), constants, interval_b, scale, inner, outer)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, start: Tensor, end: Tensor, scale: float | None, softcap:
    float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    how = _launch_of("forward", q, k, v, T, start, scale, softcap)
    if B * T * H:
        with on_device(q):
            _forward_kernel[(ceil_div(T, how.config.tile), B * H)](
                q, k, v, sink, start, end, *outputs, *_strides(q, k, v), how.interval_b, T, S, H, H // K,
                how.inner, how.outer, BM=how.config.tile, BN=how.config.step, HAS_SINK=sink is not None,
                **how.constants,
            )  # fmt: skip
    return outputs


def backward_queries(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, start: Tensor,
    end: Tensor, scale: float | None, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    how = _launch_of("queries", q, k, v, T, start, scale, softcap)
    if B * T * H:
        with on_device(q):
            _queries_kernel[(ceil_div(T, how.config.tile), B * H)](
                d_out, d_lse, q, k, v, out, lse, start, end, *outputs, *_strides(d_out, q, k, v), how.interval_b,
                T, S, H, H // K, how.scale, how.inner, how.outer, BM=how.config.tile, BN=how.config.step,
                HAS_D_LSE=d_lse is not None, **how.constants,
            )  # fmt: skip
    return outputs


def backward_keys(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, start: Tensor, end: Tensor, scale:
    float | None, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    how = _launch_of("keys", q, k, v, S, start, scale, softcap)
    if B * S * K:
        with on_device(q):
            _keys_kernel[(ceil_div(S, how.config.tile), B * K)](
                d_out, q, k, v, lse, delta, start, end, *outputs, *_strides(d_out, q, k, v), how.interval_b,
                T, S, H, H // K, how.scale, how.inner, how.outer, BM=how.config.step, BN=how.config.tile,
                **how.constants,
            )  # fmt: skip
    return outputs
