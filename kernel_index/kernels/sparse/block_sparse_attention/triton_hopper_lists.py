"""The partial outputs of ``triton_lists.py`` on Hopper: warps with roles, see ``core/triton/hopper.py``.

Programs stay and draw parts of lists from a counter.  One warp copies the block's keys and values by TMA and tells the
others which part it is; four warps gather the queries of the list, 16 bytes a copy; consumers, each a warpgroup, take
its tiles of 64 rows in turn.  A row is one head of an entry, and no tile depends on another one.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernel_index.core.triton.hopper import HopperKernel, barriers, product_nt, softcapped, tiles_of, within
from kernel_index.core.triton.jit import ENABLE_FP_FUSION
from kernel_index.core.triton.launch import AttentionLaunch, processors, row_stride
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan, Segments, shift_of
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_parts import (
    GATHERERS,
    NUMBERS,
    PLANS,
    cleaned,
    entries,
    kv_slots,
    read_number,
    schedule,
)
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_rows import wide

TWO, THREE = gl.constexpr(((4, 4, 1), (200, 80, 24))), gl.constexpr(((4, 4, 4, 1), (144, 144, 56, 24)))
"""Warps and registers of the roles behind the first consumer, for two consumers and for three."""


@gluon.jit
def _gather(given, HEADS: gl.constexpr, SHIFT: gl.constexpr):
    kv, rows, q_ptr, order_ptr, q_b, q_t, q_h, first_segment, CHUNKS, G, GROUP = given
    _k_ring, _v_ring, plan, plan_full, plan_empty, _kv_full, _kv_empty = kv
    q_ring, q_full, q_empty = rows
    STAGES: gl.constexpr = q_ring.shape[0]
    D: gl.constexpr = q_ring.shape[2]
    ENTRIES: gl.constexpr = q_ring.shape[1] // HEADS
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_m = gl.arange(0, q_ring.shape[1], layout=gl.SliceLayout(1, WIDE))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, ONE)
    while segment >= 0:
        at = turn % PLANS
        start, stop = read_number(plan, at * NUMBERS + 2, ONE), read_number(plan, at * NUMBERS + 3, ONE)
        mbarrier.arrive(plan_empty.index(at), count=1)
        group = (first_segment + segment) // CHUNKS
        p_q = q_ptr + (group // G).to(gl.int64) * q_b + (group % G * GROUP).to(gl.int64) * q_h
        p_rows = p_q + ((o_m % HEADS) * q_h)[:, None] + o_d[None, :]
        entry = entries(order_ptr, start, stop, o_m, HEADS)
        count = gl.cdiv(stop - start, ENTRIES)
        for i in range(count):
            following = entries(order_ptr, start + (i + 1) * ENTRIES, stop, o_m, HEADS)
            slot = (tile + i) % STAGES
            o_row = (gl.maximum(entry, 0) >> SHIFT).to(gl.int64) * q_t
            mbarrier.wait(q_empty.index(slot), (((tile + i) // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(
                q_ring.index(slot), p_rows + o_row[:, None], mask=(entry >= 0)[:, None]
            )
            async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
            entry = following
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, ONE)


@gluon.jit
def _store(done, p_out, HEADS: gl.constexpr):
    """The partial outputs of a tile, and of each row its number, −1 for none."""
    out, number = done
    DV: gl.constexpr = out.shape[1]
    WIDE: gl.constexpr = wide(DV)
    o_wide = gl.arange(0, out.shape[0], layout=gl.SliceLayout(1, WIDE))
    p_rows = p_out + ((o_wide % HEADS) * DV)[:, None] + gl.arange(0, DV, layout=gl.SliceLayout(0, WIDE))[None, :]
    # Nothing reads them before all are there: the cache may keep queries.
    gl.store(
        p_rows + (number.to(gl.int64) * (HEADS * DV))[:, None], out, mask=(number >= 0)[:, None],
        eviction_policy="evict_first",
    )  # fmt: skip


@gluon.jit
def _partial(
    done, rows, k_tile, v_tile, flags, order_ptr, bounds, outputs, tile, first, stop, first_key, masked, bad, of_query,
    N, inner, outer, HEADS: gl.constexpr, SHIFT: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """The partial results of the rows of a tile, of the entries from ``first`` on, which the next tile stores: a fence
    waits for stores.  ``done``: those of the tile before.

    ``masked``: some rows may not see all keys, or values are not finite.  ``of_query``: which query is the first one of
    the segment; the partials of query t and head h are those from ``((t − of_query) · N + j) · HEADS + h`` on.
    """
    q_ring, q_full, q_empty = rows
    p_start, p_end = bounds
    p_out, p_lse = outputs
    STAGES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BN: gl.constexpr = k_tile.shape[0]
    DV: gl.constexpr = v_tile.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    WIDE: gl.constexpr = wide(DV)
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    o_wide = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    slot = tile % STAGES
    mbarrier.wait(q_full.index(slot), (tile // STAGES) & 1)
    fence_async_shared()
    zero = gl.full([ROWS, BN], 0.0, gl.float32, layout=S_LAYOUT)
    s_started = product_nt(q_ring.index(slot), k_tile, zero)
    _store(done, p_out, HEADS)
    entry = gl.load(order_ptr + first + o_m // HEADS, mask=first + o_m // HEADS < stop, other=-1)
    of_wide = gl.load(order_ptr + first + o_wide // HEADS, mask=first + o_wide // HEADS < stop, other=-1)
    m_m = entry >= 0
    s = warpgroup_mma_wait(0, [s_started])
    mbarrier.arrive(q_empty.index(slot), count=1)
    z = softcapped(s, inner, CAPPED) * outer
    if masked:
        token = gl.where(m_m, entry, 0) >> SHIFT
        start, end = gl.load(p_start + token), gl.load(p_end + token)
        o_k = first_key + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        z = gl.where(m_m[:, None] & within(o_k[None, :], start[:, None], end[:, None]), z, float("-inf"))
    row_max = gl.max(z, 1)
    p = gl.exp2(z - gl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    if bad >= 2:  # rows that see a value that is not finite become NaN
        p = gl.where(z == float("-inf"), 0.0, p + flags.load(gl.SliceLayout(0, S_LAYOUT))[None, :])
    row_sum = gl.sum(p, 1)
    nothing = gl.full([ROWS, DV], 0.0, gl.float32, layout=O_LAYOUT)
    b_p = gl.convert_layout(p.to(v_tile.dtype), gl.DotOperandLayout(0, O_LAYOUT, k_width=2))
    acc_started = warpgroup_mma(b_p, v_tile, nothing, use_acc=False, is_async=True)
    m_empty = row_sum == 0.0
    row_sum = gl.where(m_empty, 1.0, row_sum)
    lse = gl.where(m_empty, float("-inf"), row_max + gl.log2(row_sum))
    # t · N + j is less than 2^31 where t · 2^SHIFT + j is.
    number = entry - (entry >> SHIFT) * ((1 << SHIFT) - N) - of_query * N
    gl.store(p_lse + (number * HEADS + o_m % HEADS), lse, mask=m_m)
    number = of_wide - (of_wide >> SHIFT) * ((1 << SHIFT) - N) - of_query * N
    number = gl.where(of_wide >= 0, number, -1)
    acc = warpgroup_mma_wait(0, [acc_started])
    out = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return gl.convert_layout(out.to(p_out.dtype.element_ty), WIDE), number


@gluon.jit
def _consume(
    given, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, HEADS: gl.constexpr, SHIFT: gl.constexpr,
    CAPPED: gl.constexpr,
):  # fmt: skip
    (
        kv, rows, flag_ring, v_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, v_b, v_t, v_h, window_b,
        first_segment, S, G, GROUPS, N, CHUNK, CHUNKS, inner, outer,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    ENTRIES: gl.constexpr = rows[0].shape[1] // HEADS
    BN: gl.constexpr = k_ring.shape[1]
    DV: gl.constexpr = v_ring.shape[2]
    WIDE: gl.constexpr = wide(DV)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ROWS: gl.constexpr = rows[0].shape[1]
    flags = flag_ring.index(CONSUMER)
    no_out = gl.full([ROWS, DV], 0.0, out_ptr.dtype.element_ty, layout=WIDE)
    no_number = gl.full([ROWS], -1, gl.int32, layout=gl.SliceLayout(1, WIDE))
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, ONE)
    while segment >= 0:
        at = turn % PLANS
        first_key = read_number(plan, at * NUMBERS + 1, ONE) * BN
        first, stop = read_number(plan, at * NUMBERS + 2, ONE), read_number(plan, at * NUMBERS + 3, ONE)
        bad, masked = read_number(plan, at * NUMBERS + 5, ONE), read_number(plan, at * NUMBERS + 6, ONE)
        mbarrier.arrive(plan_empty.index(at), count=1)
        group, chunk = (first_segment + segment) // CHUNKS, (first_segment + segment) % CHUNKS
        b, g = group // G, group % G
        bounds = start_ptr + b * window_b, end_ptr + b * window_b
        o_segment = segment.to(gl.int64) * CHUNK * N * HEADS
        outputs = out_ptr + o_segment * DV, lse_ptr + o_segment
        count = gl.cdiv(stop - first, ENTRIES)
        mbarrier.wait(kv_full.index(at), (turn // PLANS) & 1)
        k_tile, v_tile = k_ring.index(at), v_ring.index(at)
        if bad >= 2:
            p_v = v_ptr + b.to(gl.int64) * v_b + (g // GROUPS).to(gl.int64) * v_h + first_key.to(gl.int64) * v_t
            cleaned(v_tile, p_v, v_t, S - first_key, flags, WIDE)
        done = no_out, no_number
        for i in range((CONSUMER + CONSUMERS - tile % CONSUMERS) % CONSUMERS, count, CONSUMERS):
            done = _partial(
                done, rows, k_tile, v_tile, flags, order_ptr, bounds, outputs, tile + i, first + i * ENTRIES, stop,
                first_key, i < masked, bad, chunk * CHUNK, N, inner, outer, HEADS, SHIFT, CAPPED,
            )  # fmt: skip
        mbarrier.arrive(kv_empty.index(at), count=1)
        _store(done, outputs[0], HEADS)
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, ONE)


@functools.partial(HopperKernel, do_not_specialize=["first_segment"])  # else one kernel more for each launch
def _partials_kernel(
    k_desc, v_desc, q_ptr, v_ptr, order_ptr, items_ptr, parts_ptr, bad_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    counter_ptr, q_b, q_t, q_h, v_b, v_t, v_h, window_b, first_segment, SEGMENTS, S, G, GROUPS, N, M, BLOCKS, CHUNK,
    CHUNKS, inner, outer,
    D: gl.constexpr, GROUP: gl.constexpr, SHIFT: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CAPPED: gl.constexpr,
):  # fmt: skip
    """The parts of the lists of SEGMENTS segments, M of each at most.  See ``triton_lists.py``."""
    HEADS: gl.constexpr = GROUP
    ROWS: gl.constexpr = 64
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], k_desc.dtype)
    kv = kv_slots(k_desc, v_desc, CONSUMERS)
    rows = (
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, ROWS, D], LAYOUT),
        barriers(STAGES, GATHERERS),
        barriers(STAGES, 1),
    )
    BN: gl.constexpr = k_desc.block_type.shape[1]
    flag_ring = gl.allocate_shared_memory(gl.float32, [CONSUMERS, BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    consumed = (
        kv, rows, flag_ring, v_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, v_b, v_t, v_h, window_b,
        first_segment, S, G, GROUPS, N, CHUNK, CHUNKS, inner, outer,
    )  # fmt: skip
    gathered = (kv, rows, q_ptr, order_ptr, q_b, q_t, q_h, first_segment, CHUNKS, G, GROUP)
    scheduled = (
        k_desc, v_desc, kv, items_ptr, parts_ptr, bad_ptr, counter_ptr, first_segment, SEGMENTS, M, BLOCKS, CHUNKS, G,
        GROUPS, order_ptr, start_ptr, end_ptr, window_b,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (consumed, 0, 2, HEADS, SHIFT, CAPPED)),
                (_consume, (consumed, 1, 2, HEADS, SHIFT, CAPPED)),
                (_gather, (gathered, HEADS, SHIFT)),
                (schedule, (scheduled, ROWS // HEADS, SHIFT, False)),
            ],
            TWO[0],
            TWO[1],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consumed, 0, 3, HEADS, SHIFT, CAPPED)),
                (_consume, (consumed, 1, 3, HEADS, SHIFT, CAPPED)),
                (_consume, (consumed, 2, 3, HEADS, SHIFT, CAPPED)),
                (_gather, (gathered, HEADS, SHIFT)),
                (schedule, (scheduled, ROWS // HEADS, SHIFT, False)),
            ],
            THREE[0],
            THREE[1],
        )


SHAPE = [2, 4]
"""Consumers, and slots of the ring of queries."""


def partials(
    q: Tensor, k: Tensor, v: Tensor, plan: ListPlan, bounds: tuple[Tensor, Tensor], cut: Segments,
    part: tuple[int, int], bad: Tensor, launch: AttentionLaunch, outputs: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill the partial outputs and log-sum-exps of the segments of one launch, ``part``: the first, and how many.

    ``bad``: see ``unfit_blocks``.
    """
    c, items, (first, segments), (consumers, stages) = launch.constants, plan.items.shape[1], part, SHAPE
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _partials_kernel[(min(items * segments, processors(q)),)](
        tiles_of(k, c["BLOCK"]), tiles_of(v, c["BLOCK"]), q, v, plan.order, plan.items, plan.parts, bad, *bounds,
        *outputs, counter, *q.stride()[:3], *v.stride()[:3], row_stride(bounds[0]), first, segments, k.shape[1],
        cut.groups, cut.groups // k.shape[2], cut.count, items, plan.parts.shape[1] - 1, cut.chunk, cut.chunks,
        launch.inner, launch.outer, q.shape[3], cut.group, shift_of(cut.count), consumers, stages, c["CAPPED"],
        num_warps=4, enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
