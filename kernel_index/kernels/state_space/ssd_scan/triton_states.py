"""The state between two chunks: a walk over the chunks, forwards for states and backwards for their gradients.

    forwards   h ← exp(Σ log_decay)·h + Σ_j exp(Σ_{r>j} log_decay_r)·dt_j·x_j ⊗ b_j
    backwards  h ← exp(Σ log_decay)·h + Σ_i exp(Σ_{r≤i} log_decay_r)·d_y_i ⊗ c_i

A program keeps a tile of one head's state in registers, in float32, through all chunks.  So a chunk's addition never
goes through memory, and what does is written once, rounded to the dtype in which the other kernels multiply it.
"""

import triton.language as tl

from kernel_index.core.triton.attention import dot, narrow
from kernel_index.core.triton.jit import jit
from kernel_index.kernels.state_space.ssd_scan.triton_steps import segment_of


@jit
def state_tile(p_base, o_p, o_n, P: tl.constexpr, N: tl.constexpr):
    """Pointers to a tile of a dense [P, N] matrix, and which of its elements exist."""
    return p_base + (o_p[:, None] * N + o_n[None, :]), (o_p < P)[:, None] & (o_n < N)[None, :]


@jit
def _load_columns(p_base, o_t, row_stride, o_d, T, D: tl.constexpr):
    """[Q, columns] of tokens ``o_t``; zeros after the last one."""
    m_tile = (o_t < T)[:, None] & (o_d < D)[None, :]
    return tl.load(p_base + o_t.to(tl.int64)[:, None] * row_stride + o_d[None, :], mask=m_tile, other=0.0)


@jit
def states_kernel(
    left_ptr, right_ptr, steps_ptr, segments_ptr, first_ptr, states_ptr, last_ptr,
    left_b, left_t, left_h, right_b, right_t, right_g, segments_b, B, T, H, HEADS_OF_GROUP, chunks,
    FIRST: tl.constexpr, LAST: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr, UPCAST: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``states`` [B, chunks, H, P, N]: for each chunk what the walk brings to it; ``last`` is what leaves the last."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)  # [BP]
    o_n = tl.program_id(2) * BN + tl.arange(0, BN)  # [BN]
    p_left = left_ptr + b * left_b + tl.cast(h, tl.int64) * left_h
    p_right = right_ptr + b * right_b + (h // HEADS_OF_GROUP) * right_g
    p_steps = steps_ptr + (b * H + h) * chunks * Q
    size = tl.cast(B, tl.int64) * H * chunks * Q
    p_segments = segments_ptr + b * segments_b if SEGMENTS else segments_ptr
    state = tl.zeros((BP, BN), tl.float32)
    if FIRST:
        p_first, m_state = state_tile(first_ptr + (b * H + h) * P * N, o_p, o_n, P, N)
        state = tl.load(p_first, mask=m_state, other=0.0).to(tl.float32)
    for i in range(0, chunks):
        k = chunks - 1 - i if REVERSE else i
        p_state, m_state = state_tile(states_ptr + ((b * chunks + k) * H + h) * P * N, o_p, o_n, P, N)
        tl.store(p_state, narrow(state, states_ptr.dtype.element_ty, UPCAST), mask=m_state)
        o_t = k * Q + tl.arange(0, Q)  # [Q]
        b_left = _load_columns(p_left, o_t, left_t, o_p, T, P)  # [Q, BP]
        b_right = _load_columns(p_right, o_t, right_t, o_n, T, N)  # [Q, BN]
        high, end = tl.load(p_steps + size + o_t), tl.load(p_steps + size + (k + 1) * Q - 1)
        if REVERSE:
            weight = tl.exp2(high)  # [Q]
        else:
            low, end_low = tl.load(p_steps + 2 * size + o_t), tl.load(p_steps + 2 * size + (k + 1) * Q - 1)
            weight = tl.load(p_steps + o_t) * tl.exp2((end - high) + (end_low - low))  # [Q]
        before = state * tl.exp2(end)
        if SEGMENTS:  # by selection of both factors: what is not finite in another document adds nothing
            enters, leaves = segment_of(p_segments, k * Q - 1, T), segment_of(p_segments, (k + 1) * Q - 1, T)
            m_own = segment_of(p_segments, o_t, T) == (enters if REVERSE else leaves)  # [Q]
            weight = tl.where(m_own, weight, 0.0)
            b_left = tl.where(m_own[:, None], b_left, 0.0)
            b_right = tl.where(m_own[:, None], b_right, 0.0)
            before = tl.where(enters == leaves, before, 0.0)
        weighted = narrow(b_left.to(tl.float32) * weight[:, None], b_right.dtype, UPCAST)
        state = before + dot(tl.trans(weighted), b_right, UPCAST)
    if LAST:
        p_last, m_state = state_tile(last_ptr + (b * H + h) * P * N, o_p, o_n, P, N)
        tl.store(p_last, state, mask=m_state)
