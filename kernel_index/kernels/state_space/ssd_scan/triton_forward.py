"""y of each chunk: products inside the chunk, and with the state that enters it."""

import triton.language as tl

from kernel_index.core.triton.attention import dot, load_tile, store_tile, weighted_sum
from kernel_index.core.triton.jit import jit
from kernel_index.kernels.state_space.ssd_scan.triton_steps import segment_of


@jit
def sees(p_segments, first, o_i, o_j, T, SEGMENTS: tl.constexpr):
    """Whether token i of a chunk sees token j."""
    m_seen = o_j <= o_i
    if SEGMENTS:
        m_seen &= segment_of(p_segments, first + o_i, T) == segment_of(p_segments, first + o_j, T)
    return m_seen


@jit
def sees_state(p_segments, first, o_i, T, SEGMENTS: tl.constexpr):
    """Whether token i sees the state before the chunk."""
    m_first = o_i >= 0
    if SEGMENTS:
        m_first = segment_of(p_segments, first + o_i, T) == segment_of(p_segments, first - 1, T)
    return m_first


@jit
def decays_within(p_high, p_low, o_i, o_j, m_seen):
    """``exp(Σ_{j<r≤i} log_decay_r)``, at most 1 also where i does not see j."""
    high = tl.load(p_high + o_i) - tl.load(p_high + o_j)
    low = tl.load(p_low + o_i) - tl.load(p_low + o_j)
    return tl.exp2(tl.where(m_seen, high + low, 0.0))


@jit
def _scan_heads(
    cb, b_c, m_seen, m_first, p_x, p_steps, p_states, d_ptr, p_y, x_t, x_h, first, T, H, h_begin, h_end, size, padded,
    SKIP: tl.constexpr, SEGMENTS: tl.constexpr, UPCAST: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The heads of a group share ``cb`` = c·bᵀ [i, j]."""
    o_q = tl.arange(0, Q)
    o_i, o_j = o_q[:, None], o_q[None, :]
    for h in range(h_begin, h_end):
        b_x = load_tile(p_x + tl.cast(h, tl.int64) * x_h, first, x_t, T, Q, P, BLOCK_P)  # [Q, BLOCK_P]
        b_state = load_tile(p_states + h * (P * N), 0, N, P, BLOCK_P, N, BLOCK_N)  # [BLOCK_P, BLOCK_N]
        p_dt = p_steps + tl.cast(h, tl.int64) * padded + first
        w = cb * decays_within(p_dt + size, p_dt + 2 * size, o_i, o_j, m_seen)
        w = tl.where(m_seen, w * tl.load(p_dt + o_q)[None, :], 0.0)  # [i, j]
        decay = tl.exp2(tl.load(p_dt + size + o_q))  # [Q]
        y = dot(b_c, tl.trans(b_state), UPCAST) * decay[:, None]  # [Q, BLOCK_P]
        if SEGMENTS:
            y = tl.where(m_first[:, None], y, 0.0)
        y += weighted_sum(w, b_x, m_seen, True, UPCAST)
        if SKIP:
            y += tl.load(d_ptr + h).to(tl.float32) * b_x.to(tl.float32)
        store_tile(p_y + h * P, first, H * P, y, T, Q, P, BLOCK_P, UPCAST)


@jit
def scan_kernel(
    x_ptr, b_ptr, c_ptr, steps_ptr, segments_ptr, states_ptr, d_ptr, y_ptr, x_b, x_t, x_h, b_sb, b_st, b_sg,
    c_sb, c_st, c_sg, segments_b, B, T, H, HEADS_OF_GROUP, chunks, heads,
    SKIP: tl.constexpr, SEGMENTS: tl.constexpr, UPCAST: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of up to ``heads`` heads of one group."""
    b, k = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    parts = tl.cdiv(HEADS_OF_GROUP, heads)
    g, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    h_begin = g * HEADS_OF_GROUP + part * heads
    h_end = tl.minimum(h_begin + heads, (g + 1) * HEADS_OF_GROUP)
    first = k * Q
    p_segments = segments_ptr + b * segments_b if SEGMENTS else segments_ptr
    o_q = tl.arange(0, Q)
    m_seen = sees(p_segments, first, o_q[:, None], o_q[None, :], T, SEGMENTS)  # [i, j]
    m_first = sees_state(p_segments, first, o_q, T, SEGMENTS)  # [Q]
    b_b = load_tile(b_ptr + b * b_sb + g * b_sg, first, b_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    b_c = load_tile(c_ptr + b * c_sb + g * c_sg, first, c_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    cb = dot(b_c, tl.trans(b_b), UPCAST)  # [i, j]
    padded = chunks * Q
    size = tl.cast(B, tl.int64) * H * padded
    p_x, p_steps = x_ptr + b * x_b, steps_ptr + b * H * padded
    p_states, p_y = states_ptr + (b * chunks + k) * H * (P * N), y_ptr + b * T * H * P
    _scan_heads(
        cb, b_c, m_seen, m_first, p_x, p_steps, p_states, d_ptr, p_y, x_t, x_h, first, T, H, h_begin, h_end, size,
        padded, SKIP, SEGMENTS, UPCAST, P, N, Q, BLOCK_P, BLOCK_N,
    )  # fmt: skip
