"""dK and dV of lists on Hopper, where another kernel makes dQ: warps with roles, see ``triton_hopper_lists.py``.

Two consumers, each a warpgroup, take the tiles of a list in turn and compute all of them: while one waits for its
products, the other one multiplies.  Each holds sums of its own, which the merge adds in order.

    S = K·Qᵀ [BN, ROWS], P = exp2(S − lse), dV += P·dO, dP = V·dOᵀ, dZ = P·(dP − delta), dK += dZ·Q
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

from kernel_index.core.triton.hopper import HopperKernel, product_nt, softcapped, tiles_of
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

CONSUMERS = gl.constexpr(2)

ROLES = gl.constexpr(((4, 4, 1), (216, 56, 24)))
"""Warps and registers of the roles behind the first consumer."""


@gluon.jit
def _add_tile(
    dk, dv, rows, k_tile, v_tile, flags, tile, first_key, masked, bad, inner, outer,
    CAPPED: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sums with the rows of a tile.  ``masked``: some may not see all keys, or keys are not finite.

    No sum is in flight across a branch: the compiler would wait for every product.
    """
    q_ring, do_ring, lse_ring, delta_ring, _start_ring, _end_ring, _full, empty = rows
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    slot = await_rows(rows, tile, masked, wide(q_ring.shape[2]), wide(do_ring.shape[2]))
    q_tile, do_tile = q_ring.index(slot), do_ring.index(slot)
    zero = gl.full([k_tile.shape[0], q_tile.shape[0]], 0.0, gl.float32, layout=S_LAYOUT)
    s = warpgroup_mma_wait(0, [product_nt(k_tile, q_tile, zero)])
    z = softcapped(s, inner, CAPPED)
    lse = lse_ring.index(slot).load(COLUMN)
    p = gl.exp2(z * outer - lse[None, :])
    if bad % 2 == 1:  # rows that see a key that is not finite become NaN
        p += flags.load(gl.SliceLayout(1, S_LAYOUT))[:, None]
    if masked:
        p += ((lse + delta_ring.index(slot).load(COLUMN)) * 0.0)[None, :]
        p = gl.where(unseen(rows, slot, k_tile.shape[0], first_key, S_LAYOUT), 0.0, p)
    b_p = gl.convert_layout(p.to(do_ring.dtype), gl.DotOperandLayout(0, dv.type.layout, k_width=2))
    if CAPPED:
        p = p * (1.0 - z * z)
    dp_started = product_nt(v_tile, do_tile, zero)
    dv_started = warpgroup_mma(b_p, do_tile, dv, is_async=True)
    dp, dv = warpgroup_mma_wait(0, [dp_started, dv_started])
    dz = p * (dp - delta_ring.index(slot).load(COLUMN)[None, :])
    if masked:  # 0 times a dp of NaN is not 0
        dz = gl.where(unseen(rows, slot, k_tile.shape[0], first_key, S_LAYOUT), 0.0, dz)
    w_dz = gl.convert_layout(dz.to(q_ring.dtype), gl.DotOperandLayout(0, dk.type.layout, k_width=2))
    dk = warpgroup_mma_wait(0, [warpgroup_mma(w_dz, q_tile, dk, is_async=True)])
    mbarrier.arrive(empty.index(slot), count=1)
    return dk, dv


@gluon.jit
def _consume(given, CONSUMER: gl.constexpr, ENTRIES: gl.constexpr, CAPPED: gl.constexpr):
    (
        kv, rows, flag_ring, k_ptr, dk_ptr, dv_ptr, k_b, k_t, k_h, first_segment, S, G, GROUPS, M, CHUNKS, scale,
        inner, outer,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    ROWS: gl.constexpr = rows[0].shape[1]
    BN: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flags = flag_ring.index(CONSUMER)
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, ONE)
    while segment >= 0:
        at = turn % PLANS
        block = read_number(plan, at * NUMBERS + 1, ONE)
        first, stop = read_number(plan, at * NUMBERS + 2, ONE), read_number(plan, at * NUMBERS + 3, ONE)
        part, bad = read_number(plan, at * NUMBERS + 4, ONE), read_number(plan, at * NUMBERS + 5, ONE)
        masked = read_number(plan, at * NUMBERS + 6, ONE)
        mbarrier.arrive(plan_empty.index(at), count=1)
        b, g = (first_segment + segment) // CHUNKS // G, (first_segment + segment) // CHUNKS % G
        first_key = block * BN
        count = gl.cdiv(stop - first, ENTRIES)
        dk = gl.full([BN, D], 0.0, gl.float32, layout=K_LAYOUT)
        dv = gl.full([BN, DV], 0.0, gl.float32, layout=V_LAYOUT)
        mbarrier.wait(kv_full.index(at), (turn // PLANS) & 1)
        k_tile, v_tile = k_ring.index(at), v_ring.index(at)
        if bad % 2 == 1:
            p_k = k_ptr + b.to(gl.int64) * k_b + (g // GROUPS).to(gl.int64) * k_h + first_key.to(gl.int64) * k_t
            cleaned(k_tile, p_k, k_t, S - first_key, flags, wide(D))
        for i in range(CONSUMER, count, CONSUMERS):  # whatever the program did before: a sum's bits depend on it
            dk, dv = _add_tile(
                dk, dv, rows, k_tile, v_tile, flags, tile + i, first_key, i < masked, bad, inner, outer, CAPPED,
                S_LAYOUT,
            )  # fmt: skip
        mbarrier.arrive(kv_empty.index(at), count=1)
        o_part = ((segment * M + part).to(gl.int64) * CONSUMERS + CONSUMER) * BN
        gl.store(dk_ptr + o_part * D + offsets(BN, D, K_LAYOUT), dk * scale)
        gl.store(dv_ptr + o_part * DV + offsets(BN, DV, V_LAYOUT), dv)
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, ONE)


@functools.partial(HopperKernel, do_not_specialize=["first_segment"])  # else one kernel more for each launch
def _keys_kernel(
    k_desc, v_desc, q_ptr, do_ptr, k_ptr, lse_ptr, delta_ptr, order_ptr, items_ptr, parts_ptr, bad_ptr, start_ptr,
    end_ptr, dk_ptr, dv_ptr, counter_ptr, q_b, q_t, q_h, do_b, do_t, do_h, k_b, k_t, k_h, window_b, first_segment,
    SEGMENTS, T, S, G, GROUPS, M, BLOCKS, CHUNKS, scale, inner, outer,
    D: gl.constexpr, DV: gl.constexpr, GROUP: gl.constexpr, SHIFT: gl.constexpr, STAGES: gl.constexpr,
    CAPPED: gl.constexpr,
):  # fmt: skip
    """The parts of the lists of SEGMENTS segments, M of each at most.  See ``triton_lists_backward.py``."""
    ROWS: gl.constexpr = 64
    BN: gl.constexpr = k_desc.block_type.shape[1]
    kv = kv_slots(k_desc, v_desc, CONSUMERS)
    rows = row_slots(STAGES, ROWS, D, DV, k_desc.dtype, 1)
    flag_ring = gl.allocate_shared_memory(gl.float32, [CONSUMERS, BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    consumed = (
        kv, rows, flag_ring, k_ptr, dk_ptr, dv_ptr, k_b, k_t, k_h, first_segment, S, G, GROUPS, M, CHUNKS, scale,
        inner, outer,
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
            (_consume, (consumed, 0, ROWS // GROUP, CAPPED)),
            (_consume, (consumed, 1, ROWS // GROUP, CAPPED)),
            (gather_rows, (gathered, GROUP, SHIFT)),
            (schedule, (scheduled, ROWS // GROUP, SHIFT, False)),
        ],
        ROLES[0],
        ROLES[1],
    )


STAGES = 4
"""Slots of the ring of rows."""


def keys(
    of_rows: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, plan: ListPlan,
    bounds: tuple[Tensor, Tensor], cut: Segments, part: tuple[int, int], bad: Tensor, launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill the partials of dK and dV, two for each part.

    ``of_rows``: the gradient of the output, the log-sum-exp and ``delta``; ``part``: the first segment of the launch,
    and how many; ``bad``: see ``unfit_blocks``.
    """
    c, items, (first, segments), (d_out, lse, delta) = launch.constants, plan.items.shape[1], part, of_rows
    programs, counter = min(items * segments, processors(q)), torch.zeros(1, dtype=torch.int32, device=q.device)
    _keys_kernel[(programs,)](
        tiles_of(k, c["BLOCK"]), tiles_of(v, c["BLOCK"]), q, d_out, k, lse, delta, plan.order, plan.items, plan.parts,
        bad, *bounds, *outputs, counter, *q.stride()[:3], *d_out.stride()[:3], *k.stride()[:3], row_stride(bounds[0]),
        first, segments, q.shape[1], k.shape[1], cut.groups, cut.groups // k.shape[2], items, plan.parts.shape[1] - 1,
        cut.chunks, launch.scale, launch.inner, launch.outer, q.shape[3], v.shape[3], cut.group, shift_of(cut.count),
        STAGES, c["CAPPED"], num_warps=4, enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
