"""The consumers of the forward pass by unions, see ``triton_hopper_unions.py``.

A consumer takes two blocks at once where all its queries may see all their keys: waits, maxima and the sums so far,
which are multiplied, then come half as often.  Which blocks are taken together depends on the union and the bounds
alone, not on what is not finite: a query that does not select such a block has the same bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernel_index.core.triton.hopper import product_nt, softcapped, within
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_parts import CHUNK, cleaned, noted, read_number
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_rows import (
    inner_bounds,
    row_place,
    store_rows,
    wide,
)


@gluon.jit
def _logits(s, bits, o_local, inner, outer, CAPPED: gl.constexpr):
    z = softcapped(s, inner, CAPPED) * outer
    return gl.where((((bits >> o_local) & 1) != 0)[:, None], z, float("-inf"))


@gluon.jit
def _maxima(row_max, z):
    """The new maxima, a finite number in their place, and what the sums so far are multiplied by."""
    new_max = gl.maximum(row_max, gl.max(z, 1))
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, shift, gl.exp2(row_max - shift)


@gluon.jit
def _add_values(p, v_tile, sums, alpha):
    """Started: the sums times ``alpha``, and the values of a block by their weights."""
    O_LAYOUT: gl.constexpr = sums.type.layout
    acc = sums * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    b_p = gl.convert_layout(p.to(v_tile.dtype), gl.DotOperandLayout(0, O_LAYOUT, k_width=2))
    return warpgroup_mma(b_p, v_tile, acc, is_async=True)


@gluon.jit
def _add_one(q_tile, k_tile, v_tile, state, bits, o_local, inner, outer, CAPPED: gl.constexpr):
    """The state with a block of which all queries may see all keys."""
    acc, row_max, row_sum = state
    S_LAYOUT: gl.constexpr = row_max.type.layout.parent
    zero = gl.full([64, k_tile.shape[0]], 0.0, gl.float32, layout=S_LAYOUT)
    s = warpgroup_mma_wait(0, [product_nt(q_tile, k_tile, zero)])
    z = _logits(s, bits, o_local, inner, outer, CAPPED)
    row_max, shift, alpha = _maxima(row_max, z)
    p = gl.exp2(z - shift[:, None])
    acc = warpgroup_mma_wait(0, [_add_values(p, v_tile, acc, alpha)])
    return acc, row_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def _add_two(q_tile, k_a, v_a, k_b, v_b, state, bits_a, bits_b, o_local, inner, outer, CAPPED: gl.constexpr):
    acc, row_max, row_sum = state
    S_LAYOUT: gl.constexpr = row_max.type.layout.parent
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, k_width=2)
    zero = gl.full([64, k_a.shape[0]], 0.0, gl.float32, layout=S_LAYOUT)
    a_started, b_started = product_nt(q_tile, k_a, zero), product_nt(q_tile, k_b, zero)
    z_a = _logits(warpgroup_mma_wait(1, [a_started]), bits_a, o_local, inner, outer, CAPPED)
    z_b = _logits(warpgroup_mma_wait(0, [b_started]), bits_b, o_local, inner, outer, CAPPED)
    row_max, shift, alpha = _maxima(row_max, gl.maximum(z_a, z_b))
    p_a = gl.exp2(z_a - shift[:, None])
    acc_started = _add_values(p_a, v_a, acc, alpha)
    p_b = gl.exp2(z_b - shift[:, None])
    b_p = gl.convert_layout(p_b.to(v_b.dtype), P_LAYOUT)
    acc = warpgroup_mma_wait(0, [warpgroup_mma(b_p, v_b, acc_started, is_async=True)])
    return acc, row_max, row_sum * alpha + gl.sum(p_a + p_b, 1)


@gluon.jit
def _add_carefully(
    q_tile, k_tile, v_tile, flags, state, bits, bounds, first_key, bad, o_local, inner, outer, CAPPED: gl.constexpr
):
    """The state with a block whose keys some query may not see, or that holds what is not finite."""
    acc, row_max, row_sum = state
    start, end = bounds
    S_LAYOUT: gl.constexpr = row_max.type.layout.parent
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    zero = gl.full([64, k_tile.shape[0]], 0.0, gl.float32, layout=S_LAYOUT)
    s = warpgroup_mma_wait(0, [product_nt(q_tile, k_tile, zero)])
    z = _logits(s, bits, o_local, inner, outer, CAPPED)
    o_k = first_key + gl.arange(0, k_tile.shape[0], layout=COLUMN)
    z = gl.where(within(o_k[None, :], start[:, None], end[:, None]), z, float("-inf"))
    row_max, shift, alpha = _maxima(row_max, z)
    p = gl.exp2(z - shift[:, None])
    if bad >= 2:  # rows that see a value that is not finite become NaN
        p = gl.where(z == float("-inf"), 0.0, p + flags.load(COLUMN)[None, :])
    acc = warpgroup_mma_wait(0, [_add_values(p, v_tile, acc, alpha)])
    return acc, row_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def consume_forward(given, CONSUMER: gl.constexpr, HEADS: gl.constexpr, CAPPED: gl.constexpr):
    (
        row_rings, buffers, flag_ring, _k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, _delta_ptr, v_b, v_t, v_h,
        window_b, TILES, T, S, H, G, GROUPS, GROUP, total, QUERIES, _scale, inner, outer,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, info, plan_full, plan_empty, q_full, q_empty, kv_full, kv_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    BN: gl.constexpr = k_ring.shape[1]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    WIDE: gl.constexpr = wide(DV)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_local = gl.arange(0, 64, layout=ROW) // HEADS
    flags = flag_ring.index(CONSUMER)
    turn = 0
    at = 0
    chunk = 0
    mbarrier.wait(plan_full.index(0), 0)
    number = read_number(plan, 0, ONE)
    while number < total:
        size = read_number(plan, 1, ONE)
        mbarrier.arrive(plan_empty.index(0), count=1)
        b, g, first, o_q, o_h = row_place(number, TILES, G, GROUP, QUERIES, HEADS, CONSUMER, ROW)
        p_start, p_end = start_ptr + b * window_b, end_ptr + b * window_b
        start = gl.load(p_start + o_q, mask=o_q < T, other=0)
        end = gl.load(p_end + o_q, mask=o_q < T, other=0)
        low, high = inner_bounds(p_start, p_end, first, T, QUERIES)
        state = (
            gl.full([64, DV], 0.0, gl.float32, layout=O_LAYOUT),
            gl.full([64], float("-inf"), gl.float32, layout=ROW),
            gl.full([64], 0.0, gl.float32, layout=ROW),
        )
        held = -1  # the number of a block that waits for another one
        held_bits = 0
        mbarrier.wait(q_full.index(0), turn & 1)
        q_tile = row_rings[0].index(CONSUMER)
        for i in range(size):
            slot = (at + i) % STAGES
            notes = chunk + i // CHUNK
            mbarrier.wait(kv_full.index(slot), ((at + i) // STAGES) & 1)
            bits = noted(info, notes, 1 + CONSUMER, i, ONE)
            first_key, bad = noted(info, notes, 0, i, ONE) * BN, noted(info, notes, 3, i, ONE)
            inner_block = (first_key >= low) & (first_key + BN <= high)  # all queries see all of its keys
            plain = (bits != 0) & inner_block & (bad == 0)
            k_tile, v_tile = k_ring.index(slot), v_ring.index(slot)
            k_held, v_held = k_ring.index(held % STAGES), v_ring.index(held % STAGES)
            if plain & (held >= 0) & (held_bits != 0):
                state = _add_two(
                    q_tile, k_held, v_held, k_tile, v_tile, state, held_bits, bits, o_local, inner, outer, CAPPED
                )
                mbarrier.arrive(kv_empty.index(held % STAGES), count=1)
                mbarrier.arrive(kv_empty.index(slot), count=1)
                held = -1
            elif plain & (held < 0):
                held = at + i
                held_bits = bits
            else:
                was_held = held >= 0
                # The producer waits for the slot that is held where the others are behind it.
                if was_held & ((bits != 0) | (at + i + 1 - held >= STAGES)):
                    if held_bits != 0:
                        state = _add_one(q_tile, k_held, v_held, state, held_bits, o_local, inner, outer, CAPPED)
                        mbarrier.arrive(kv_empty.index(held % STAGES), count=1)
                    held = -1
                if bits != 0:
                    if bad >= 2:
                        p_v = v_ptr + b.to(gl.int64) * v_b + (g // GROUPS) * v_h + first_key.to(gl.int64) * v_t
                        cleaned(v_tile, p_v, v_t, S - first_key, flags, WIDE)
                    state = _add_carefully(
                        q_tile, k_tile, v_tile, flags, state, bits, (start, end), first_key, bad, o_local, inner, outer,
                        CAPPED,
                    )  # fmt: skip
                    if inner_block & (bad != 0) & (not was_held):
                        held = at + i
                        held_bits = 0  # nothing is left of it, but the next one is taken alone, as if it were held
                mbarrier.arrive(kv_empty.index(slot), count=1)
        if (held >= 0) & (held_bits != 0):
            slot = held % STAGES
            state = _add_one(
                q_tile, k_ring.index(slot), v_ring.index(slot), state, held_bits, o_local, inner, outer, CAPPED
            )
            mbarrier.arrive(kv_empty.index(slot), count=1)
        acc, row_max, row_sum = state
        at += size
        chunk += gl.cdiv(size, CHUNK)
        mbarrier.arrive(q_empty.index(0), count=1)
        m_empty = row_sum == 0.0
        row_sum = gl.where(m_empty, 1.0, row_sum)
        lse = gl.where(m_empty, float("-inf"), row_max + gl.log2(row_sum))
        gl.store(lse_ptr + (b.to(gl.int64) * T + o_q) * H + o_h, lse, mask=o_q < T)
        out = acc * gl.convert_layout(1.0 / row_sum, OUT_ROW)[:, None]
        _, _, _, w_q, w_h = row_place(number, TILES, G, GROUP, QUERIES, HEADS, CONSUMER, gl.SliceLayout(1, WIDE))
        store_rows(out_ptr, out, b, w_q, w_h, T, H, WIDE)
        turn += 1
        mbarrier.wait(plan_full.index(0), turn & 1)
        number = read_number(plan, 0, ONE)
