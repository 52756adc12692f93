"""The forward pass of a tile's union on Hopper: a consumer of ``triton_hopper_unions.py``, and what its rows share.

While the weights of a block are computed, the product of the scores before them with their values is on its way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernel_index.core.triton.hopper import product_nt, softcapped, within
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_parts import cleaned, read_number

CONSUMERS = gl.constexpr(2)

INFO = gl.constexpr(4)
"""Of a block of a union: its number, the queries of the first and of the second consumer that selected it as bits, and
what of it is not finite: 1 keys, 2 values."""


@gluon.jit
def row_place(number, TILES, G, GROUP, QUERIES, HEADS: gl.constexpr, CONSUMER: gl.constexpr, LAYOUT: gl.constexpr):
    """Batch row, group, the first query of a consumer, and of its rows [64] the query and the head."""
    group, tile = number // TILES, TILES - 1 - number % TILES
    b, g = group // G, group % G
    first = (tile * CONSUMERS + CONSUMER) * QUERIES
    o_m = gl.arange(0, 64, layout=LAYOUT)
    return b, g, first, first + o_m // HEADS, g * GROUP + o_m % HEADS


@gluon.jit
def inner_bounds(p_start, p_end, first, T, QUERIES):
    """From where on and up to where all queries of a consumer see keys: bounds never decrease."""
    last = gl.maximum(gl.minimum(first + QUERIES, T) - 1, 0)
    return gl.load(p_start + last), gl.load(p_end + gl.minimum(first, T - 1))


@gluon.jit
def store_rows(p_out, value, b, o_q, o_h, T, H, LAYOUT: gl.constexpr):
    """64 rows of a dense tensor [B, T, H, columns], in stores of 16 bytes."""
    COLUMNS: gl.constexpr = value.shape[1]
    value = gl.convert_layout(value.to(p_out.dtype.element_ty), LAYOUT)
    o_column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    o_row = (b.to(gl.int64) * T + o_q) * H + o_h
    gl.store(p_out + o_row[:, None] * COLUMNS + o_column[None, :], value, mask=(o_q < T)[:, None])


@gluon.jit
def _weights(
    s, row_max, row_sum, bits, first_key, bad, flags, o_local, start, end, low, high, inner, outer,
    CAPPED: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a block for 64 rows, what the sums so far are multiplied by, and the new maxima and sums of rows."""
    BN: gl.constexpr = s.shape[1]
    z = softcapped(s, inner, CAPPED) * outer
    z = gl.where((((bits >> o_local) & 1) != 0)[:, None], z, float("-inf"))
    if (first_key < low) | (first_key + BN > high) | (bad != 0):
        o_k = first_key + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        z = gl.where(within(o_k[None, :], start[:, None], end[:, None]), z, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(z, 1))
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(z - shift[:, None])
    alpha = gl.exp2(row_max - shift)
    if bad >= 2:  # rows that see a value that is not finite become NaN
        p = gl.where(z == float("-inf"), 0.0, p + flags.load(gl.SliceLayout(0, S_LAYOUT))[None, :])
    return p, alpha, new_max, row_sum * alpha + gl.sum(p, 1)


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
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.full([64, BN], 0.0, gl.float32, layout=S_LAYOUT)
    o_local = gl.arange(0, 64, layout=ROW) // HEADS
    flags = flag_ring.index(CONSUMER)
    turn = 0
    at = 0
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
        row_max = gl.full([64], float("-inf"), gl.float32, layout=ROW)
        row_sum = gl.full([64], 0.0, gl.float32, layout=ROW)
        acc = gl.full([64, DV], 0.0, gl.float32, layout=O_LAYOUT)
        mbarrier.wait(q_full.index(0), turn & 1)
        q_tile = row_rings[0].index(CONSUMER)
        b_p = gl.full([64, BN], 0.0, v_ring.dtype, layout=P_LAYOUT)
        before = -1  # the slot of the block whose weights are b_p and whose values are still to be added
        for i in range(size):
            slot = (at + i) % STAGES
            mbarrier.wait(kv_full.index(slot), ((at + i) // STAGES) & 1)
            bits = read_number(info, slot * INFO + 1 + CONSUMER, ONE)
            first_key, bad = read_number(info, slot * INFO, ONE) * BN, read_number(info, slot * INFO + 3, ONE)
            if (bits != 0) & (bad >= 2):
                p_v = v_ptr + b.to(gl.int64) * v_b + (g // GROUPS) * v_h + first_key.to(gl.int64) * v_t
                cleaned(v_ring.index(slot), p_v, v_t, S - first_key, flags, WIDE)
            if (bits != 0) & (before >= 0):
                s_started = product_nt(q_tile, k_ring.index(slot), zero)
                acc_started = warpgroup_mma(b_p, v_ring.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, [s_started])
                p, alpha, row_max, row_sum = _weights(
                    s, row_max, row_sum, bits, first_key, bad, flags, o_local, start, end, low, high, inner, outer,
                    CAPPED, S_LAYOUT,
                )  # fmt: skip
                acc = warpgroup_mma_wait(0, [acc_started])
                mbarrier.arrive(kv_empty.index(before), count=1)
                acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
                b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
                before = slot
            else:
                if before >= 0:  # a slot that is kept while others are skipped would stop the producer
                    acc = warpgroup_mma_wait(0, [warpgroup_mma(b_p, v_ring.index(before), acc, is_async=True)])
                    mbarrier.arrive(kv_empty.index(before), count=1)
                    before = -1
                if bits != 0:
                    s = warpgroup_mma_wait(0, [product_nt(q_tile, k_ring.index(slot), zero)])
                    p, alpha, row_max, row_sum = _weights(
                        s, row_max, row_sum, bits, first_key, bad, flags, o_local, start, end, low, high, inner, outer,
                        CAPPED, S_LAYOUT,
                    )  # fmt: skip
                    acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
                    b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
                    before = slot
                else:
                    mbarrier.arrive(kv_empty.index(slot), count=1)
        if before >= 0:
            acc = warpgroup_mma_wait(0, [warpgroup_mma(b_p, v_ring.index(before), acc, is_async=True)])
            mbarrier.arrive(kv_empty.index(before), count=1)
        at += size
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
