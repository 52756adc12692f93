"""The consumers of the forward pass by unions, see ``triton_hopper_unions.py``.

The values of a block are added while the scores of the next one are awaited and its weights computed: until then the
weights of a block, and its slot of the ring, are held.  No branch is taken while products are on their way, or the
compiler would wait for every one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernel_index.core.triton.hopper import computed_before, product_nt, softcapped, within
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_parts import CHUNK, cleaned, noted, read_number
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_rows import (
    CONSUMERS,
    inner_bounds,
    row_place,
    store_rows,
    wide,
)


@gluon.jit
def _weights(z, row_max, row_sum):
    """Of logits: weights, what the sums so far are multiplied by, and the new maxima and sums of rows."""
    new_max = gl.maximum(row_max, gl.max(z, 1))
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(z - shift[:, None])
    alpha = gl.exp2(row_max - shift)
    return p, alpha, new_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def _logits(s, bits, o_local, inner, outer, CAPPED: gl.constexpr):
    z = softcapped(s, inner, CAPPED) * outer
    return gl.where((((bits >> o_local) & 1) != 0)[:, None], z, float("-inf"))


@gluon.jit
def _careful_weights(z, row_max, row_sum, bounds, first_key, bad, flags, S_LAYOUT: gl.constexpr):
    """Of a block whose keys some row may not see, or that holds what is not finite."""
    start, end = bounds
    o_k = first_key + gl.arange(0, z.shape[1], layout=gl.SliceLayout(0, S_LAYOUT))
    z = gl.where(within(o_k[None, :], start[:, None], end[:, None]), z, float("-inf"))
    p, alpha, row_max, row_sum_before = _weights(z, row_max, row_sum)
    if bad >= 2:  # rows that see a value that is not finite become NaN
        p = gl.where(z == float("-inf"), 0.0, p + flags.load(gl.SliceLayout(0, S_LAYOUT))[None, :])
        row_sum_before = row_sum * alpha + gl.sum(p, 1)
    return p, alpha, row_max, row_sum_before


@gluon.jit
def _add_block(acc, b_p, v_ring, kv_empty, held):
    """The values of the block that was held, whose slot is free then."""
    slot = held % v_ring.shape[0]
    acc = warpgroup_mma_wait(0, [warpgroup_mma(b_p, v_ring.index(slot), acc, is_async=True)])
    mbarrier.arrive(kv_empty.index(slot), count=1)
    return acc


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
    SLOTS: gl.constexpr = q_full.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    WIDE: gl.constexpr = wide(DV)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.full([64, BN], 0.0, gl.float32, layout=S_LAYOUT)
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
        row_max = gl.full([64], float("-inf"), gl.float32, layout=ROW)
        row_sum = gl.full([64], 0.0, gl.float32, layout=ROW)
        acc = gl.full([64, DV], 0.0, gl.float32, layout=O_LAYOUT)
        b_p = gl.full([64, BN], 0.0, v_ring.dtype, layout=P_LAYOUT)
        held = -1  # the number of the block whose weights are b_p and whose values are still to be added
        mbarrier.wait(q_full.index(turn % SLOTS), (turn // SLOTS) & 1)
        q_tile = row_rings[0].index(turn % SLOTS * CONSUMERS + CONSUMER)
        for i in range(size):
            slot = (at + i) % STAGES
            notes = chunk + i // CHUNK
            mbarrier.wait(kv_full.index(slot), ((at + i) // STAGES) & 1)
            bits = noted(info, notes, 1 + CONSUMER, i, ONE)
            first_key, bad = noted(info, notes, 0, i, ONE) * BN, noted(info, notes, 3, i, ONE)
            plain = (first_key >= low) & (first_key + BN <= high) & (bad == 0)
            if (bits != 0) & plain & (held >= 0):
                s_started = product_nt(q_tile, k_ring.index(slot), zero)
                acc_started = warpgroup_mma(b_p, v_ring.index(held % STAGES), acc, is_async=True)
                s = warpgroup_mma_wait(1, [s_started])
                z = _logits(s, bits, o_local, inner, outer, CAPPED)
                p, alpha, row_max, row_sum = _weights(z, row_max, row_sum)
                computed_before(kv_full.index(slot), ((at + i) // STAGES) & 1)
                acc = warpgroup_mma_wait(0, [acc_started])
                mbarrier.arrive(kv_empty.index(held % STAGES), count=1)
                acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
                b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
                held = at + i
            elif bits != 0:
                if held >= 0:
                    acc = _add_block(acc, b_p, v_ring, kv_empty, held)
                if bad >= 2:
                    p_v = v_ptr + b.to(gl.int64) * v_b + (g // GROUPS) * v_h + first_key.to(gl.int64) * v_t
                    cleaned(v_ring.index(slot), p_v, v_t, S - first_key, flags, WIDE)
                s = warpgroup_mma_wait(0, [product_nt(q_tile, k_ring.index(slot), zero)])
                z = _logits(s, bits, o_local, inner, outer, CAPPED)
                p, alpha, row_max, row_sum = _careful_weights(
                    z, row_max, row_sum, (start, end), first_key, bad, flags, S_LAYOUT
                )
                acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
                b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
                held = at + i
            else:
                mbarrier.arrive(kv_empty.index(slot), count=1)
                if (held >= 0) & (at + i + 1 - held >= STAGES):  # the producer waits for the slot that is held
                    acc = _add_block(acc, b_p, v_ring, kv_empty, held)
                    held = -1
        if held >= 0:
            acc = _add_block(acc, b_p, v_ring, kv_empty, held)
        at += size
        chunk += gl.cdiv(size, CHUNK)
        mbarrier.arrive(q_empty.index(turn % SLOTS), count=1)
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
