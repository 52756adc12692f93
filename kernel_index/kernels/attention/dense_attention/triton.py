"""Attention by windows: tiles outside a query's window are never visited, those inside all of them need no mask.

Forward and dQ (``triton_backward.py``) go by tiles of queries over the keys, dK and dV by tiles of keys over the
queries, so that nothing is summed by atomics.  In a tree a kernel takes its tiles from a list, in the same order as it
would count them: full ones, then masked ones.  Names and units are those of ``core/triton/attention.py``.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    LOG2E,
    full_tile,
    has_nan,
    listed_tiles,
    load_tile,
    masked_tile,
    online_softmax,
    scores,
    softmax_output,
    store_tile,
    weighted_sum,
    window_tiles,
    within,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, on_device, row_stride, strides
from kernel_index.kernels.attention.dense_attention.geometry import Paths, arguments_of, launch_of


@jit
def _forward_step(
    acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, first, o_q, start, end, q_end_ptr, S, inner,
    outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    o_k = first + tl.arange(0, BN)  # [BN]
    b_k = load_tile(p_k, first, k_t, S, BN, D, BLOCK_D)  # [BN, BLOCK_D]
    logits = scores(b_q, b_k, inner, CAPPED, UPCAST) * outer  # [BM, BN]
    m_seen = within(o_k[None, :], start[:, None], end[:, None])  # [BM, BN]
    if LISTED and MASKED:
        m_seen = m_seen & (o_q[:, None] < tl.load(q_end_ptr + o_k, mask=o_k < S, other=0)[None, :])
    if MASKED:
        logits = tl.where(m_seen, logits, float("-inf"))
    p, alpha, row_max, row_sum = online_softmax(logits, row_max, row_sum)
    b_v = load_tile(p_v, first, v_t, S, BN, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    acc = acc * alpha[:, None] + weighted_sum(p, b_v, m_seen, MASKED and CAREFUL, UPCAST)
    return acc, row_max, row_sum


@jit
def _forward_walk(
    b_q, p_k, p_v, k_t, v_t, low, left, full, right, o_q, start, end, q_end_ptr, list_ptr,
    tiles, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    STAGES: tl.constexpr = 1 if CAREFUL else None
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    for i in tl.range(0, full, num_stages=STAGES):
        first_key = full_tile(i, low, left, list_ptr, BN, LISTED)
        acc, row_max, row_sum = _forward_step(
            acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, first_key, o_q, start, end, q_end_ptr, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, False, CAREFUL, LISTED,
        )  # fmt: skip
    for i in tl.range(0, left + right, num_stages=STAGES):
        first_key = masked_tile(i, low, left, full, list_ptr, tiles, BN, LISTED)
        acc, row_max, row_sum = _forward_step(
            acc, row_max, row_sum, b_q, p_k, p_v, k_t, v_t, first_key, o_q, start, end, q_end_ptr, S, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BN, CAPPED, UPCAST, True, CAREFUL, LISTED,
        )  # fmt: skip
    return acc, row_max, row_sum


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, start_ptr, end_ptr, q_end_ptr, list_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, window_b, q_end_b, list_b, tiles, T, S, H, G, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr, HAS_SINK: tl.constexpr, UPCAST: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; ``start`` and ``end`` are the window bounds of its rows."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the long rows of a causal mask begin first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    start_ptr += b * window_b
    end_ptr += b * window_b
    o_q = first + tl.arange(0, BM)  # [BM]
    start = tl.load(start_ptr + o_q, mask=o_q < T, other=0)  # [BM]
    end = tl.load(end_ptr + o_q, mask=o_q < T, other=0)  # [BM]
    if LISTED:
        q_end_ptr += b * q_end_b
        list_ptr += b * list_b + (first // BM) * (2 + 2 * tiles)
        low, left, full, right = listed_tiles(list_ptr)
    else:
        low, left, full, right = window_tiles(start_ptr, end_ptr, first, T, BM, BN)
    b_q = load_tile(q_ptr + b * q_b + h * q_h, first, q_t, T, BM, D, BLOCK_D)  # [BM, BLOCK_D]
    kv_head = h // G
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    acc, row_max, row_sum = _forward_walk(
        b_q, p_k, p_v, k_t, v_t, low, left, full, right, o_q, start, end, q_end_ptr, list_ptr, tiles, S,
        inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, CAPPED, UPCAST, False, LISTED,
    )  # fmt: skip
    if has_nan(acc):
        acc, row_max, row_sum = _forward_walk(
            b_q, p_k, p_v, k_t, v_t, low, left, full, right, o_q, start, end, q_end_ptr, list_ptr, tiles,
            S, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, CAPPED, UPCAST, True, LISTED,
        )  # fmt: skip
    m_empty = start >= end  # [BM]
    if HAS_SINK:  # the sink logit is part of the denominator of every query that has a key
        sink = tl.load(sink_ptr + h).to(tl.float32) * LOG2E
        new_max = tl.where(m_empty, 0.0, tl.maximum(row_max, sink))
        alpha = tl.exp2(row_max - new_max)
        acc = acc * alpha[:, None]
        row_sum = row_sum * alpha + tl.exp2(sink - new_max)
        row_max = new_max
    out, lse = softmax_output(acc, row_max, row_sum, m_empty)
    store_tile(out_ptr + (b * T * H + h) * DV, first, H * DV, out, T, BM, DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + (b * H + h) * T + o_q, lse, mask=o_q < T)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bounds: tuple[Tensor, Tensor], scale: float | None, softcap:
    float, outputs: tuple[Tensor, Tensor], paths: Paths | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    launch = launch_of("forward", q, v, T, scale, softcap, HAS_SINK=sink is not None, LISTED=paths is not None)
    seen, strides_of_paths = arguments_of(paths, 1)
    if B * T * H:
        with on_device(q):
            _forward_kernel[(ceil_div(T, launch.config.tile), B * H)](
                q, k, v, sink, *bounds, *seen, *outputs, *strides(q, k, v), row_stride(bounds[0]), *strides_of_paths,
                T, S, H, H // K, launch.inner, launch.outer, **launch.constants,
            )  # fmt: skip
    return outputs
