"""Step sizes and decays of every token, made once for the kernels that read them, and the gradients behind them.

``steps`` is float32 [3, B, H, chunks · Q]: the step size after bias and softplus, then the sum of log₂-decays from the
start of the chunk, or of the token's segment in it, as a float32 ``high`` and what that has rounded off, ``low``.  The
decay from token j to i is ``exp2((high_i − high_j) + (low_i − low_j))``: with both parts it is as exact as a sum of its
own terms, whatever decayed before j.  Tokens after the last one have a step of 0 and decay nothing.
"""

import triton.language as tl

from kernel_index.core.triton.attention import LOG2E
from kernel_index.core.triton.jit import jit


@jit
def softplus(x):
    """log(1 + exp(x)), with log(1 + e) = 2·artanh(e / (2 + e)) as a series: exact for the smallest e, too."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)  # at most 1/3
    s2 = s * s
    series = 1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 / 15))))))
    return tl.where(x > 0, x, 0.0) + tl.where(x == x, 2.0 * s * series, x)


@jit
def raw_step(dt, bias_ptr, o_h, m_h, BIAS: tl.constexpr):
    """dt + bias in float32."""
    dt = dt.to(tl.float32)
    if BIAS:
        dt += tl.load(bias_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)
    return dt


@jit
def segment_of(p_segments, o_t, T):
    """The segment of tokens; those after the last one belong to its segment, those before the first to its own."""
    return tl.load(p_segments + tl.minimum(tl.maximum(o_t, 0), T - 1))


@jit
def _add_in_segment(left, left_starts, right, right_starts):
    """Two neighbouring sums, of which the right one begins anew where a segment starts in it."""
    return tl.where(right_starts > 0, right, left + right), tl.maximum(left_starts, right_starts)


@jit
def steps_kernel(
    dt_ptr, a_ptr, bias_ptr, segments_ptr, steps_ptr, dt_b, dt_t, dt_h, segments_b, B, T, H, chunks,
    BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SEGMENTS: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One chunk of BH heads.  The sums are of float64, each of its own terms."""
    b, k = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)  # [BH]
    o_t = k * Q + tl.arange(0, Q)  # [Q]
    m_h = o_h < H
    m_tile = (o_t < T)[:, None] & m_h[None, :]
    p_dt = dt_ptr + b * dt_b + o_t.to(tl.int64)[:, None] * dt_t + o_h.to(tl.int64)[None, :] * dt_h
    dt = raw_step(tl.load(p_dt, mask=m_tile, other=0.0), bias_ptr, o_h[None, :], m_h[None, :], BIAS)  # [Q, BH]
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.where(m_tile, dt, 0.0)
    a = tl.load(a_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)
    log_decay = (dt * a[None, :]).to(tl.float64)  # [Q, BH]
    starts = tl.zeros((Q, BH), tl.int32)
    if SEGMENTS:
        p_segments = segments_ptr + b * segments_b
        m_starts = segment_of(p_segments, o_t, T) != segment_of(p_segments, o_t - 1, T)  # [Q]
        starts += m_starts.to(tl.int32)[:, None]
    total, _ = tl.associative_scan((log_decay, starts), 0, _add_in_segment)
    total *= LOG2E
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    padded = chunks * Q
    size = tl.cast(B, tl.int64) * H * padded
    p_steps = steps_ptr + (b * H + o_h)[None, :] * padded + o_t[:, None]
    tl.store(p_steps, dt, mask=m_h[None, :])
    tl.store(p_steps + size, high, mask=m_h[None, :])
    tl.store(p_steps + 2 * size, low, mask=m_h[None, :])


@jit
def steps_backward_kernel(
    d_steps_ptr, steps_ptr, dt_ptr, a_ptr, bias_ptr, d_dt_ptr, parts_ptr, dt_b, dt_t, dt_h, B, T, H, padded, tiles,
    BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """A program takes each ``num_programs``-th tile of tokens of BH heads, and sums what its heads share.

    ``d_steps`` is float32 [3, B, H, padded]: gradients of the step as a factor of x, of the log-decay, and d_y · x.
    """
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)[None, :]  # [1, BH]
    m_h = o_h < H
    a = tl.load(a_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)
    size = tl.cast(B, tl.int64) * H * padded
    d_a = tl.zeros((BT, BH), tl.float32)
    d_bias = tl.zeros((BT, BH), tl.float32)
    d_skip = tl.zeros((BT, BH), tl.float32)
    for tile in range(tl.program_id(0), B * tiles, tl.num_programs(0)):
        b = (tile // tiles).to(tl.int64)
        o_t = (tile % tiles) * BT + tl.arange(0, BT)[:, None]  # [BT, 1]
        m_tile = (o_t < T) & m_h
        o_steps = (b * H + o_h) * padded + o_t  # [BT, BH]
        d_factor = tl.load(d_steps_ptr + o_steps, mask=m_tile, other=0.0)
        d_log = tl.load(d_steps_ptr + size + o_steps, mask=m_tile, other=0.0)
        d_skip += tl.load(d_steps_ptr + 2 * size + o_steps, mask=m_tile, other=0.0)
        d_a += d_log * tl.load(steps_ptr + o_steps, mask=m_tile, other=0.0)
        d_dt = d_factor + d_log * a
        if SOFTPLUS:
            p_dt = dt_ptr + b * dt_b + o_t.to(tl.int64) * dt_t + o_h * dt_h
            raw = raw_step(tl.load(p_dt, mask=m_tile, other=0.0), bias_ptr, o_h, m_h, BIAS)
            d_dt = d_dt * tl.sigmoid(raw)
        d_bias += d_dt
        p_out = d_dt_ptr + (b * T + o_t) * H + o_h
        tl.store(p_out, d_dt.to(d_dt_ptr.dtype.element_ty), mask=m_tile)
    p_parts = parts_ptr + tl.program_id(0) * 3 * H + o_h
    tl.store(p_parts, tl.sum(d_a, 0)[None, :], mask=m_h)
    tl.store(p_parts + H, tl.sum(d_bias, 0)[None, :], mask=m_h)
    tl.store(p_parts + 2 * H, tl.sum(d_skip, 0)[None, :], mask=m_h)
