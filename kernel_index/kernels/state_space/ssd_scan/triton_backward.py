"""The gradients of a chunk, from the state that enters it and the gradient of the state that leaves it.

With ``decay_ij`` from token j to i of the chunk, ``dt_j`` and ``cb_ij = c_i·b_j`` as in the forward pass, a head has

    v_j     = Σ_i cb_ij·decay_ij·d_y_i + decay_{end,j}·(b_j·d_stateᵀ)         gradient of dt_j·x_j
    ds_ij   = (d_y_i·x_j)·decay_ij·dt_j                                       gradient of cb_ij
    d_log_r = Σ_{j<r≤i} ds_ij·cb_ij + Σ_{i≥r} q_i + Σ_{j<r} g_j + e           gradient of the log-decay of token r

where q_i = d_y_i·(decay_i·c_i·stateᵀ) is what token i reads of the state, g_j = decay_{end,j}·dt_j·(x_j·(b_j·d_stateᵀ))
what token j adds to it, and e the whole chunk's decay of it.  The first sum is that over rows i ≥ r less that over
columns j ≥ r, of one float32 matrix: what cancels is the same number in both.

Two kernels share the work: what both keep in registers would not fit beside each other.  ``through_states_kernel``
has the gradients of b and c through the states, q, g and e; ``within_chunk_kernel`` the matrices of two tokens, and
what is left.  b and c are of a group: ``ds`` is added up over its heads, and multiplied once, by ``group_kernel``.
``bc`` = b·cᵀ comes from memory and ``ds`` goes there: in a chain of products Triton would not divide the columns among
eight warps.  Here matrices of two tokens are [j, i], as v wants them.
"""

import triton.language as tl

from kernel_index.core.triton.attention import dot, load_tile, store_tile, weighted_sum
from kernel_index.core.triton.jit import jit
from kernel_index.kernels.state_space.ssd_scan.triton_forward import decays_within, sees, sees_state
from kernel_index.kernels.state_space.ssd_scan.triton_steps import segment_of


@jit
def square(p_base, Q: tl.constexpr):
    """Pointers to a dense [Q, Q] matrix."""
    return p_base + (tl.arange(0, Q)[:, None] * Q + tl.arange(0, Q)[None, :])


@jit
def products_kernel(
    b_ptr, c_ptr, bc_ptr, b_sb, b_st, b_sg, c_sb, c_st, c_sg, T, G, chunks,
    UPCAST: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``bc`` = b·cᵀ, float32 [B, chunks, G, Q, Q]."""
    b, k = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    g = tl.program_id(1)
    b_b = load_tile(b_ptr + b * b_sb + g * b_sg, k * Q, b_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    b_c = load_tile(c_ptr + b * c_sb + g * c_sg, k * Q, c_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    tl.store(square(bc_ptr + ((b * chunks + k) * G + g) * (Q * Q), Q), dot(b_b, tl.trans(b_c), UPCAST))


@jit
def _through_states(
    b_b, b_c, m_first, m_last, passes, p_x, p_dy, p_steps, p_states, p_d_states, p_ends, p_db, p_dc,
    x_t, x_h, dy_t, dy_h, first, T, G, h_begin, h_end, size, padded,
    SEGMENTS: tl.constexpr, UPCAST: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head after another; the gradients of b and c stay in registers until the last one."""
    o_q = tl.arange(0, Q)
    db = tl.zeros((Q, BLOCK_N), tl.float32)
    dc = tl.zeros((Q, BLOCK_N), tl.float32)
    for h in range(h_begin, h_end):
        b_x = load_tile(p_x + tl.cast(h, tl.int64) * x_h, first, x_t, T, Q, P, BLOCK_P)  # [Q, BLOCK_P]
        b_dy = load_tile(p_dy + tl.cast(h, tl.int64) * dy_h, first, dy_t, T, Q, P, BLOCK_P)  # [Q, BLOCK_P]
        b_state = load_tile(p_states + h * (P * N), 0, N, P, BLOCK_P, N, BLOCK_N)  # [BLOCK_P, BLOCK_N]
        b_d_state = load_tile(p_d_states + h * (P * N), 0, N, P, BLOCK_P, N, BLOCK_N)  # [BLOCK_P, BLOCK_N]
        p_dt = p_steps + tl.cast(h, tl.int64) * padded + first
        dt, high, low = tl.load(p_dt + o_q), tl.load(p_dt + size + o_q), tl.load(p_dt + 2 * size + o_q)  # [Q]
        end, end_low = tl.load(p_dt + size + Q - 1), tl.load(p_dt + 2 * size + Q - 1)
        dc_h = dot(b_dy, b_state, UPCAST) * tl.exp2(high)[:, None]  # [Q, BLOCK_N]
        if SEGMENTS:
            dc_h = tl.where(m_first[:, None], dc_h, 0.0)
        dc += dc_h
        q = tl.sum(dc_h * b_c.to(tl.float32), 1)  # [Q]
        added = dot(b_x, b_d_state, UPCAST) * tl.exp2((end - high) + (end_low - low))[:, None]  # [Q, BLOCK_N]
        if SEGMENTS:
            added = tl.where(m_last[:, None], added, 0.0)
        db += added * dt[:, None]
        added_x = tl.sum(added * b_b.to(tl.float32), 1)  # [Q], g ÷ dt
        kept = tl.exp2(end) * tl.sum(tl.sum(b_state.to(tl.float32) * b_d_state.to(tl.float32), 1), 0)
        if SEGMENTS:  # what is selected here is NaN only where one's own values are
            q = tl.where(m_first, q, 0.0)
            added_x = tl.where(m_last, added_x, 0.0)
            kept = tl.where(passes, kept, 0.0)
        p_out = p_ends + tl.cast(h, tl.int64) * padded + first + o_q
        tl.store(p_out, added_x)
        tl.store(p_out + size, q)
        tl.store(p_out + 2 * size, tl.zeros((Q,), tl.float32) + kept)
    store_tile(p_db, first, G * N, db, T, Q, N, BLOCK_N, UPCAST)
    store_tile(p_dc, first, G * N, dc, T, Q, N, BLOCK_N, UPCAST)


@jit
def through_states_kernel(
    x_ptr, b_ptr, c_ptr, dy_ptr, steps_ptr, segments_ptr, states_ptr, d_states_ptr, ends_ptr, db_ptr, dc_ptr,
    x_b, x_t, x_h, b_sb, b_st, b_sg, c_sb, c_st, c_sg, dy_b, dy_t, dy_h, segments_b, B, T, H, G, chunks, heads,
    SEGMENTS: tl.constexpr, UPCAST: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of up to ``heads`` heads of one group.

    ``db`` and ``dc`` are [parts of a group, B, T, G, N], float32; ``ends`` gets g ÷ dt, q and e, as ``steps`` lies.
    """
    b, k = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    parts = tl.cdiv(H // G, heads)
    g, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    h_begin = g * (H // G) + part * heads
    h_end = tl.minimum(h_begin + heads, (g + 1) * (H // G))
    first = k * Q
    p_segments = segments_ptr + b * segments_b if SEGMENTS else segments_ptr
    m_first, m_last, passes = _sees_ends(p_segments, first, T, SEGMENTS, Q)
    b_b = load_tile(b_ptr + b * b_sb + g * b_sg, first, b_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    b_c = load_tile(c_ptr + b * c_sb + g * c_sg, first, c_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    padded = chunks * Q
    o_steps, o_states = b * H * padded, (b * chunks + k) * H * (P * N)
    o_shared = ((part * B + b) * T * G + g) * N
    _through_states(
        b_b, b_c, m_first, m_last, passes, x_ptr + b * x_b, dy_ptr + b * dy_b, steps_ptr + o_steps,
        states_ptr + o_states, d_states_ptr + o_states, ends_ptr + o_steps, db_ptr + o_shared, dc_ptr + o_shared,
        x_t, x_h, dy_t, dy_h, first, T, G, h_begin, h_end, tl.cast(B, tl.int64) * H * padded, padded,
        SEGMENTS, UPCAST, P, N, Q, BLOCK_P, BLOCK_N,
    )  # fmt: skip


@jit
def _sees_ends(p_segments, first, T, SEGMENTS: tl.constexpr, Q: tl.constexpr):
    """Which tokens of a chunk see the state that enters, which add to the one that leaves; whether that sees this."""
    o_q = tl.arange(0, Q)
    m_first = sees_state(p_segments, first, o_q, T, SEGMENTS)  # [Q]
    m_last, passes = m_first, True
    if SEGMENTS:
        leaves = segment_of(p_segments, first + Q - 1, T)
        m_last = segment_of(p_segments, first + o_q, T) == leaves
        passes = segment_of(p_segments, first - 1, T) == leaves
    return m_first, m_last, passes


@jit
def _within_chunk(
    b_b, p_bc, m_later, m_last, p_x, p_dy, p_steps, p_d_states, d_ptr, p_ends, p_dx, p_d_steps, p_ds,
    x_t, x_h, dy_t, dy_h, first, T, H, h_begin, h_end, size, padded,
    SKIP: tl.constexpr, SEGMENTS: tl.constexpr, UPCAST: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head after another; ``ds`` stays in registers until the last one."""
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float32 else tl.float32
    o_q = tl.arange(0, Q)
    o_j, o_i = o_q[:, None], o_q[None, :]
    ds = tl.zeros((Q, Q), tl.float32)
    for h in range(h_begin, h_end):
        b_x = load_tile(p_x + tl.cast(h, tl.int64) * x_h, first, x_t, T, Q, P, BLOCK_P)  # [Q, BLOCK_P]
        b_dy = load_tile(p_dy + tl.cast(h, tl.int64) * dy_h, first, dy_t, T, Q, P, BLOCK_P)  # [Q, BLOCK_P]
        p_dt = p_steps + tl.cast(h, tl.int64) * padded + first
        p_end = p_ends + tl.cast(h, tl.int64) * padded + first + o_q
        dt, added_x, q, kept = tl.load(p_dt + o_q), tl.load(p_end), tl.load(p_end + size), tl.load(p_end + 2 * size)

        decay = decays_within(p_dt + size, p_dt + 2 * size, o_i, o_j, m_later)
        xdy = dot(b_x, tl.trans(b_dy), UPCAST) * dt[:, None]
        ds += tl.where(m_later, xdy * decay, 0.0)
        w = tl.where(m_later, tl.load(square(p_bc, Q)) * decay, 0.0)  # [j, i], loaded again: no registers are left
        ds_bc = tl.where(m_later & (o_j < o_i), xdy * w, 0.0).to(SUM)
        lost = tl.sum(ds_bc, 0) + q - tl.sum(ds_bc, 1)  # [Q]
        d_log = tl.sum(tl.where(m_later, lost[None, :], 0.0), 1).to(tl.float32)  # [Q]
        d_log += tl.sum(tl.where(o_j > o_i, (added_x * dt)[None, :], 0.0), 1) + kept
        v = weighted_sum(w, b_dy, m_later, True, UPCAST)  # [Q, BLOCK_P], without what is added to the state
        x, dy = b_x.to(tl.float32), b_dy.to(tl.float32)
        p_out = p_d_steps + tl.cast(h, tl.int64) * padded + first + o_q
        tl.store(p_out, tl.sum(v * x, 1) + added_x)
        tl.store(p_out + size, d_log)
        tl.store(p_out + 2 * size, tl.sum(dy * x, 1))

        b_d_state = load_tile(p_d_states + h * (P * N), 0, N, P, BLOCK_P, N, BLOCK_N)  # [BLOCK_P, BLOCK_N]
        end, end_low = tl.load(p_dt + size + Q - 1), tl.load(p_dt + 2 * size + Q - 1)
        to_end = tl.exp2((end - tl.load(p_dt + size + o_q)) + (end_low - tl.load(p_dt + 2 * size + o_q)))  # [Q]
        added = dot(b_b, tl.trans(b_d_state), UPCAST) * to_end[:, None]  # [Q, BLOCK_P]
        if SEGMENTS:
            added = tl.where(m_last[:, None], added, 0.0)
        dx = (v + added) * dt[:, None]
        if SKIP:
            dx += tl.load(d_ptr + h).to(tl.float32) * dy
        store_tile(p_dx + h * P, first, H * P, dx, T, Q, P, BLOCK_P, UPCAST)
    tl.store(square(p_ds, Q), ds)


@jit
def within_chunk_kernel(
    x_ptr, b_ptr, dy_ptr, steps_ptr, segments_ptr, d_states_ptr, bc_ptr, d_ptr, ends_ptr, dx_ptr,
    d_steps_ptr, ds_ptr,
    x_b, x_t, x_h, b_sb, b_st, b_sg, dy_b, dy_t, dy_h, segments_b, B, T, H, G, chunks, heads,
    SKIP: tl.constexpr, SEGMENTS: tl.constexpr, UPCAST: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of up to ``heads`` heads of one group; ``ds`` is [parts of a group, B, chunks, G, Q, Q], float32.

    ``ends`` is what ``through_states_kernel`` wrote; ``d_steps`` gets the gradients of dt, of the log-decays and of d.
    """
    b, k = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    parts = tl.cdiv(H // G, heads)
    g, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    h_begin = g * (H // G) + part * heads
    h_end = tl.minimum(h_begin + heads, (g + 1) * (H // G))
    first = k * Q
    p_segments = segments_ptr + b * segments_b if SEGMENTS else segments_ptr
    o_q = tl.arange(0, Q)
    m_later = sees(p_segments, first, o_q[None, :], o_q[:, None], T, SEGMENTS)  # [j, i]
    _, m_last, _ = _sees_ends(p_segments, first, T, SEGMENTS, Q)
    b_b = load_tile(b_ptr + b * b_sb + g * b_sg, first, b_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    p_bc = bc_ptr + ((b * chunks + k) * G + g) * (Q * Q)
    padded = chunks * Q
    o_steps = b * H * padded
    _within_chunk(
        b_b, p_bc, m_later, m_last, x_ptr + b * x_b, dy_ptr + b * dy_b, steps_ptr + o_steps,
        d_states_ptr + (b * chunks + k) * H * (P * N), d_ptr, ends_ptr + o_steps,
        dx_ptr + b * T * H * P, d_steps_ptr + o_steps,
        ds_ptr + (((part * B + b) * chunks + k) * G + g) * (Q * Q),
        x_t, x_h, dy_t, dy_h, first, T, H, h_begin, h_end, tl.cast(B, tl.int64) * H * padded, padded,
        SKIP, SEGMENTS, UPCAST, P, N, Q, BLOCK_P, BLOCK_N,
    )  # fmt: skip


@jit
def group_kernel(
    b_ptr, c_ptr, segments_ptr, db_parts_ptr, dc_parts_ptr, ds_ptr, db_ptr, dc_ptr, b_sb, b_st, b_sg, c_sb, c_st, c_sg,
    segments_b, B, T, G, chunks, parts, square_parts,
    SEGMENTS: tl.constexpr, UPCAST: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``db`` and ``dc`` [B, T, G, N] of a group's chunk: their parts in order, and what the parts of ``ds`` add."""
    b, k = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    g, first = tl.program_id(1), k * Q
    db = tl.zeros((Q, BLOCK_N), tl.float32)
    dc = tl.zeros((Q, BLOCK_N), tl.float32)
    ds = tl.zeros((Q, Q), tl.float32)
    for part in range(0, parts):
        o_part = ((part * B + b) * T * G + g) * N
        db += load_tile(db_parts_ptr + o_part, first, G * N, T, Q, N, BLOCK_N)
        dc += load_tile(dc_parts_ptr + o_part, first, G * N, T, Q, N, BLOCK_N)
    for part in range(0, square_parts):
        ds += tl.load(square(ds_ptr + (((part * B + b) * chunks + k) * G + g) * (Q * Q), Q))
    p_segments = segments_ptr + b * segments_b if SEGMENTS else segments_ptr
    o_q = tl.arange(0, Q)
    m_later = sees(p_segments, first, o_q[None, :], o_q[:, None], T, SEGMENTS)  # [j, i]
    b_b = load_tile(b_ptr + b * b_sb + g * b_sg, first, b_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    b_c = load_tile(c_ptr + b * c_sb + g * c_sg, first, c_st, T, Q, N, BLOCK_N)  # [Q, BLOCK_N]
    db += weighted_sum(ds, b_c, m_later, True, UPCAST)
    dc += weighted_sum(tl.trans(ds), b_b, tl.trans(m_later), True, UPCAST)
    o_out = (b * T * G + g) * N
    store_tile(db_ptr + o_out, first, G * N, db, T, Q, N, BLOCK_N, UPCAST)
    store_tile(dc_ptr + o_out, first, G * N, dc, T, Q, N, BLOCK_N, UPCAST)
