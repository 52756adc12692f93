"""The backward pass of ``triton_lists_backward.py`` on Hopper: warps with roles, see ``triton_hopper_lists.py``.

Each product is computed once, by the warpgroup whose role it is, and a tile of 64 rows passes from one to the next:

    weights    S = K·Qᵀ [BN, ROWS], P = exp2(S − lse), dV += P·dO; gives P to the next in shared memory
    keys       dP = V·dOᵀ, dZ = P·(dP − delta), dK += dZ·Q; gives dZ to the next
    queries    dQ = dZᵀ·K, stored as the partial result of the tile's entries

Each warpgroup holds one sum, and only the third waits for stores of dQ.  Scores are transposed, so the weights that dV
and dK need stay in registers.  Where another kernel makes dQ, ``triton_hopper_keys.py`` takes the call.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernel_index.core.triton.hopper import HopperKernel, barriers, product_nt, softcapped, tiles_of
from kernel_index.core.triton.jit import ENABLE_FP_FUSION
from kernel_index.core.triton.launch import AttentionLaunch, processors, row_stride
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan, Segments, shift_of
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_parts import (
    NUMBERS,
    PLANS,
    cleaned,
    kv_slots,
    read_number,
    schedule,
)
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_rows import (
    await_rows,
    gather_rows,
    offsets,
    row_slots,
    unseen,
    wide,
)

SLOTS = gl.constexpr(2)
"""Of P, and of dZ, between two roles."""

ROLES = gl.constexpr(((4, 4, 4, 1), (152, 96, 64, 24)))
"""Warps and registers of the roles behind the first: keys, queries, gather, schedule."""


@gluon.jit
def _weights(given, HEADS: gl.constexpr, CAPPED: gl.constexpr):
    """The first role: P, which goes to the next, and dV."""
    (
        kv, rows, passed, flags, k_ptr, _order_ptr, _dq_ptr, _written_ptr, _dk_ptr, dv_ptr, k_b, k_t, k_h,
        first_segment, S, G, GROUPS, _N, M, _GROUP, _CHUNK, CHUNKS, _scale, inner, outer,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    q_ring, do_ring, lse_ring, delta_ring, _start_ring, _end_ring, _full, empty = rows
    p_ring, p_full, p_empty, _dz_ring, _dz_full, _dz_empty = passed
    ROWS: gl.constexpr = q_ring.shape[1]
    ENTRIES: gl.constexpr = ROWS // HEADS
    BN: gl.constexpr = k_ring.shape[1]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    Q_WIDE: gl.constexpr = wide(k_ring.shape[2])
    DO_WIDE: gl.constexpr = wide(DV)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.full([BN, ROWS], 0.0, gl.float32, layout=S_LAYOUT)
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, ONE)
    while segment >= 0:
        at = turn % PLANS
        block = read_number(plan, at * NUMBERS + 1, ONE)
        first, stop = read_number(plan, at * NUMBERS + 2, ONE), read_number(plan, at * NUMBERS + 3, ONE)
        part, bad = read_number(plan, at * NUMBERS + 4, ONE), read_number(plan, at * NUMBERS + 5, ONE)
        masked_tiles = read_number(plan, at * NUMBERS + 6, ONE)
        mbarrier.arrive(plan_empty.index(at), count=1)
        b, g = (first_segment + segment) // CHUNKS // G, (first_segment + segment) // CHUNKS % G
        first_key = block * BN
        count = gl.cdiv(stop - first, ENTRIES)
        dv = gl.full([BN, DV], 0.0, gl.float32, layout=V_LAYOUT)
        mbarrier.wait(kv_full.index(at), (turn // PLANS) & 1)
        k_tile = k_ring.index(at)
        if bad % 2 == 1:
            p_k = k_ptr + b.to(gl.int64) * k_b + (g // GROUPS).to(gl.int64) * k_h + first_key.to(gl.int64) * k_t
            cleaned(k_tile, p_k, k_t, S - first_key, flags, Q_WIDE)
        for i in range(count):
            masked = i < masked_tiles
            slot = await_rows(rows, tile + i, masked, Q_WIDE, DO_WIDE)
            s_started = product_nt(k_tile, q_ring.index(slot), zero)
            lse = lse_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
            s = warpgroup_mma_wait(0, [s_started])
            z = softcapped(s, inner, CAPPED)
            p = gl.exp2(z * outer - lse[None, :])
            if bad % 2 == 1:  # rows that see a key that is not finite become NaN
                p += flags.load(gl.SliceLayout(1, S_LAYOUT))[:, None]
            if masked:
                p += ((lse + delta_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))) * 0.0)[None, :]
                p = gl.where(unseen(rows, slot, BN, first_key, S_LAYOUT), 0.0, p)
            b_p = gl.convert_layout(p.to(do_ring.dtype), gl.DotOperandLayout(0, V_LAYOUT, k_width=2))
            dv_started = warpgroup_mma(b_p, do_ring.index(slot), dv, is_async=True)
            if CAPPED:
                p = p * (1.0 - z * z)
            at_p = (tile + i) % SLOTS
            mbarrier.wait(p_empty.index(at_p), (((tile + i) // SLOTS) & 1) ^ 1)
            p_ring.index(at_p).store(p)
            mbarrier.arrive(p_full.index(at_p), count=1)
            dv = warpgroup_mma_wait(0, [dv_started])
            mbarrier.arrive(empty.index(slot), count=1)
        mbarrier.arrive(kv_empty.index(at), count=1)
        gl.store(dv_ptr + (segment * M + part).to(gl.int64) * BN * DV + offsets(BN, DV, V_LAYOUT), dv)
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, ONE)


@gluon.jit
def _keys(given, HEADS: gl.constexpr):
    """The second role: dZ, which goes to the next, and dK."""
    (
        kv, rows, passed, _flags, _k_ptr, _order_ptr, _dq_ptr, _written_ptr, dk_ptr, _dv_ptr, _k_b, _k_t, _k_h,
        _first_segment, _S, _G, _GROUPS, _N, M, _GROUP, _CHUNK, _CHUNKS, scale, _inner, _outer,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    q_ring, do_ring, _lse_ring, delta_ring, _start_ring, _end_ring, _full, empty = rows
    p_ring, p_full, p_empty, dz_ring, dz_full, dz_empty = passed
    ROWS: gl.constexpr = q_ring.shape[1]
    ENTRIES: gl.constexpr = ROWS // HEADS
    BN: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    Q_WIDE: gl.constexpr = wide(D)
    DO_WIDE: gl.constexpr = wide(v_ring.shape[2])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.full([BN, ROWS], 0.0, gl.float32, layout=S_LAYOUT)
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, ONE)
    while segment >= 0:
        at = turn % PLANS
        block = read_number(plan, at * NUMBERS + 1, ONE)
        first, stop = read_number(plan, at * NUMBERS + 2, ONE), read_number(plan, at * NUMBERS + 3, ONE)
        part, masked_tiles = read_number(plan, at * NUMBERS + 4, ONE), read_number(plan, at * NUMBERS + 6, ONE)
        mbarrier.arrive(plan_empty.index(at), count=1)
        first_key = block * BN
        count = gl.cdiv(stop - first, ENTRIES)
        dk = gl.full([BN, D], 0.0, gl.float32, layout=K_LAYOUT)
        mbarrier.wait(kv_full.index(at), (turn // PLANS) & 1)
        v_tile = v_ring.index(at)
        for i in range(count):
            masked = i < masked_tiles
            slot = await_rows(rows, tile + i, masked, Q_WIDE, DO_WIDE)
            dp_started = product_nt(v_tile, do_ring.index(slot), zero)
            delta = delta_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
            dp = warpgroup_mma_wait(0, [dp_started])
            at_p, phase = (tile + i) % SLOTS, ((tile + i) // SLOTS) & 1
            mbarrier.wait(p_full.index(at_p), phase)
            p = p_ring.index(at_p).load(S_LAYOUT)
            mbarrier.arrive(p_empty.index(at_p), count=1)
            dz = p * (dp - delta[None, :])
            if masked:  # 0 times a dp of NaN is not 0
                dz = gl.where(unseen(rows, slot, BN, first_key, S_LAYOUT), 0.0, dz)
            b_dz = dz.to(q_ring.dtype)
            w_dz = gl.convert_layout(b_dz, gl.DotOperandLayout(0, K_LAYOUT, k_width=2))
            dk_started = warpgroup_mma(w_dz, q_ring.index(slot), dk, is_async=True)
            mbarrier.wait(dz_empty.index(at_p), phase ^ 1)
            dz_ring.index(at_p).store(b_dz)
            fence_async_shared()
            mbarrier.arrive(dz_full.index(at_p), count=1)
            dk = warpgroup_mma_wait(0, [dk_started])
            mbarrier.arrive(empty.index(slot), count=1)
        mbarrier.arrive(kv_empty.index(at), count=1)
        gl.store(dk_ptr + (segment * M + part).to(gl.int64) * BN * D + offsets(BN, D, K_LAYOUT), dk * scale)
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, ONE)


@gluon.jit
def _queries(given, HEADS: gl.constexpr, SHIFT: gl.constexpr):
    """The third role: partial results of dQ."""
    (
        kv, rows, passed, _flags, _k_ptr, order_ptr, dq_ptr, written_ptr, _dk_ptr, _dv_ptr, _k_b, _k_t, _k_h,
        first_segment, _S, _G, _GROUPS, N, _M, GROUP, CHUNK, CHUNKS, scale, _inner, _outer,
    ) = given  # fmt: skip
    k_ring, _v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    q_ring = rows[0]
    _p_ring, _p_full, _p_empty, dz_ring, dz_full, dz_empty = passed
    ROWS: gl.constexpr = q_ring.shape[1]
    ENTRIES: gl.constexpr = ROWS // HEADS
    D: gl.constexpr = k_ring.shape[2]
    HALF: gl.constexpr = D // 2
    H_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    WIDE: gl.constexpr = wide(HALF)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    nothing = gl.full([ROWS, HALF], 0.0, gl.float32, layout=H_LAYOUT)
    o_wide = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    o_d = gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, ONE)
    while segment >= 0:
        at = turn % PLANS
        first, stop = read_number(plan, at * NUMBERS + 2, ONE), read_number(plan, at * NUMBERS + 3, ONE)
        mbarrier.arrive(plan_empty.index(at), count=1)
        # The partial of an entry is number (segment · CHUNK + t − first query) · N + j of the launch.
        o_first = (segment - (first_segment + segment) % CHUNKS).to(gl.int64) * CHUNK * N
        count = gl.cdiv(stop - first, ENTRIES)
        o_entry = first + o_wide // HEADS
        b_next = gl.load(order_ptr + o_entry, mask=o_entry < stop, other=-1)
        mbarrier.wait(kv_full.index(at), (turn // PLANS) & 1)
        k_tile = k_ring.index(at)
        for i in range(count):
            m_wide = b_next >= 0
            b_wide = gl.where(m_wide, b_next, 0)
            o_entry += ENTRIES
            b_next = gl.load(order_ptr + o_entry, mask=o_entry < stop, other=-1)
            o_partial = o_first + (b_wide >> SHIFT).to(gl.int64) * N + (b_wide & ((1 << SHIFT) - 1))
            one = gl.full([ROWS], 1, gl.int8, layout=gl.SliceLayout(1, WIDE))
            gl.store(written_ptr + o_partial, one, mask=m_wide)
            p_dq = (dq_ptr + (o_partial * GROUP + o_wide % HEADS) * D)[:, None] + o_d[None, :]
            at_z, phase = (tile + i) % SLOTS, ((tile + i) // SLOTS) & 1
            mbarrier.wait(dz_full.index(at_z), phase)
            a_dz = dz_ring.index(at_z).permute([1, 0])
            for half in gl.static_range(2):  # a sum of half as many registers
                started = warpgroup_mma(
                    a_dz, k_tile.slice(half * HALF, HALF, dim=1), nothing, use_acc=False, is_async=True
                )
                dq = warpgroup_mma_wait(0, [started])
                if half == 1:
                    mbarrier.arrive(dz_empty.index(at_z), count=1)
                b_dq = gl.convert_layout((dq * scale).to(dq_ptr.dtype.element_ty), WIDE)
                gl.store(p_dq + half * HALF, b_dq, mask=m_wide[:, None])
        mbarrier.arrive(kv_empty.index(at), count=1)
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, ONE)


@functools.partial(HopperKernel, do_not_specialize=["first_segment"])  # else one kernel more for each launch
def _lists_kernel(
    k_desc, v_desc, q_ptr, do_ptr, k_ptr, lse_ptr, delta_ptr, order_ptr, items_ptr, parts_ptr, bad_ptr, start_ptr,
    end_ptr, dq_ptr, written_ptr, dk_ptr, dv_ptr, counter_ptr, q_b, q_t, q_h, do_b, do_t, do_h, k_b, k_t,
    k_h, window_b, first_segment, SEGMENTS, T, S, G, GROUPS, N, M, BLOCKS, CHUNK, CHUNKS, scale, inner, outer,
    D: gl.constexpr, DV: gl.constexpr, GROUP: gl.constexpr, SHIFT: gl.constexpr, STAGES: gl.constexpr,
    CAPPED: gl.constexpr,
):  # fmt: skip
    """The parts of the lists of SEGMENTS segments, M of each at most.  See ``triton_lists_backward.py``."""
    ROWS: gl.constexpr = 64
    BN: gl.constexpr = k_desc.block_type.shape[1]
    CONSUMERS: gl.constexpr = 3
    DZ_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, ROWS], k_desc.dtype)
    P_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, ROWS], gl.float32)
    FLAT_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    kv = kv_slots(k_desc, v_desc, CONSUMERS)
    rows = row_slots(STAGES, ROWS, D, DV, k_desc.dtype, 2)
    passed = (
        gl.allocate_shared_memory(gl.float32, [SLOTS, BN, ROWS], P_SHARED),
        barriers(SLOTS, 1),
        barriers(SLOTS, 1),
        gl.allocate_shared_memory(k_desc.dtype, [SLOTS, BN, ROWS], DZ_SHARED),
        barriers(SLOTS, 1),
        barriers(SLOTS, 1),
    )
    flags = gl.allocate_shared_memory(gl.float32, [BN], FLAT_SHARED)
    fence_async_shared()
    consumed = (
        kv, rows, passed, flags, k_ptr, order_ptr, dq_ptr, written_ptr, dk_ptr, dv_ptr, k_b, k_t, k_h,
        first_segment, S, G, GROUPS, N, M, GROUP, CHUNK, CHUNKS, scale, inner, outer,
    )  # fmt: skip
    gathered = (
        kv, rows, q_ptr, do_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, end_ptr, q_b, q_t, q_h, do_b, do_t, do_h,
        window_b, first_segment, CHUNKS, T, G, GROUP,
    )  # fmt: skip
    scheduled = (
        k_desc, v_desc, kv, items_ptr, parts_ptr, bad_ptr, counter_ptr, first_segment, SEGMENTS, M, BLOCKS, CHUNKS, G,
        GROUPS, order_ptr, start_ptr, end_ptr, window_b,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_weights, (consumed, GROUP, CAPPED)),
            (_keys, (consumed, GROUP)),
            (_queries, (consumed, GROUP, SHIFT)),
            (gather_rows, (gathered, GROUP, SHIFT)),
            (schedule, (scheduled, ROWS // GROUP, SHIFT, True)),
        ],
        ROLES[0],
        ROLES[1],
    )


STAGES = 3
"""Slots of the ring of rows."""


def lists(
    of_rows: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, plan: ListPlan,
    bounds: tuple[Tensor, Tensor], cut: Segments, part: tuple[int, int], bad: Tensor, launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill the partials of dQ, which of them are written, and those of dK and dV.

    ``of_rows``: the gradient of the output, the log-sum-exp and ``delta``; ``part``: the first segment of the launch,
    and how many; ``bad``: see ``unfit_blocks``.
    """
    c, items, (first, segments) = launch.constants, plan.items.shape[1], part
    D, DV, programs = q.shape[3], v.shape[3], min(items * segments, processors(q))
    d_out, lse, delta = of_rows
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _lists_kernel[(programs,)](
        tiles_of(k, c["BLOCK"]), tiles_of(v, c["BLOCK"]), q, d_out, k, lse, delta, plan.order, plan.items, plan.parts,
        bad, *bounds, *outputs, counter, *q.stride()[:3], *d_out.stride()[:3], *k.stride()[:3],
        row_stride(bounds[0]), first, segments, q.shape[1], k.shape[1], cut.groups, cut.groups // k.shape[2], cut.count,
        items, plan.parts.shape[1] - 1, cut.chunk, cut.chunks, launch.scale, launch.inner, launch.outer, D, DV,
        cut.group, shift_of(cut.count), STAGES, c["CAPPED"], num_warps=4, enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
