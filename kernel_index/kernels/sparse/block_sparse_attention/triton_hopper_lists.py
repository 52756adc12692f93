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

from kernel_index.core.triton.hopper import (
    HopperKernel,
    barriers,
    copy_tile,
    product_nt,
    ring,
    softcapped,
    tiles_of,
    within,
)
from kernel_index.core.triton.jit import ENABLE_FP_FUSION
from kernel_index.core.triton.launch import AttentionLaunch, processors, row_stride
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan, Segments, shift_of

PLANS = gl.constexpr(2)
"""Parts of lists that a program knows at once: the one in work and the next."""

NUMBERS = gl.constexpr(7)
"""Of a plan: segment in the launch, block, first entry, end, which part of the segment it is, what of the block is not
finite, 1 keys, 2 values; and up to which tile there are rows that may not see all keys."""

GATHERERS = gl.constexpr(128)
"""Threads that gather queries."""


TWO, THREE = gl.constexpr(((4, 4, 1), (200, 80, 24))), gl.constexpr(((4, 4, 4, 1), (144, 144, 56, 24)))
"""Warps and registers of the roles behind the first consumer, for two consumers and for three."""


@gluon.jit
def numbers():
    return gl.allocate_shared_memory(gl.int32, [PLANS * NUMBERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def read_number(plan, i, LAYOUT: gl.constexpr):
    return gl.sum(plan.index(i).load(LAYOUT), 0)


@gluon.jit
def _tell(plan, plan_full, turn, segment, block, start, stop, part, bad, masked):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    at = turn % PLANS
    plan.index(at * NUMBERS).store(gl.full([1], 0, gl.int32, layout=ONE) + segment)
    plan.index(at * NUMBERS + 1).store(gl.full([1], 0, gl.int32, layout=ONE) + block)
    plan.index(at * NUMBERS + 2).store(gl.full([1], 0, gl.int32, layout=ONE) + start)
    plan.index(at * NUMBERS + 3).store(gl.full([1], 0, gl.int32, layout=ONE) + stop)
    plan.index(at * NUMBERS + 4).store(gl.full([1], 0, gl.int32, layout=ONE) + part)
    plan.index(at * NUMBERS + 5).store(gl.full([1], 0, gl.int32, layout=ONE) + bad)
    plan.index(at * NUMBERS + 6).store(gl.full([1], 0, gl.int32, layout=ONE) + masked)
    mbarrier.arrive(plan_full.index(at), count=1)


@gluon.jit
def _most_parts(parts_ptr, first_segment, SEGMENTS, BLOCKS):
    """How many parts the segment of the launch has that has most."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    most = gl.program_id(0) * 0
    for i in range(0, SEGMENTS, 32):
        o_segment = i + gl.arange(0, 32, layout=ONE)
        p_last = parts_ptr + (first_segment + o_segment).to(gl.int64) * (BLOCKS + 1) + BLOCKS
        most = gl.maximum(most, gl.max(gl.load(p_last, mask=o_segment < SEGMENTS, other=0), 0))
    return most


@gluon.jit
def _masked_tiles(order_ptr, first, stop, p_start, p_end, first_key, BN: gl.constexpr, ENTRIES: gl.constexpr,
                  SHIFT: gl.constexpr):  # fmt: skip
    """How many tiles of a part there are up to the last one of which a row may not see a key: bounds never decrease."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    count = gl.cdiv(stop - first, ENTRIES)
    found = count * 0
    for i in range(0, count, 32):
        o_tile = i + gl.arange(0, 32, layout=ONE)
        o_low = first + o_tile * ENTRIES
        m_tile = o_low < stop
        low = gl.load(order_ptr + o_low, mask=m_tile, other=0)
        high = gl.load(order_ptr + gl.minimum(o_low + ENTRIES, stop) - 1, mask=m_tile, other=0)
        start = gl.load(p_start + (gl.maximum(high, 0) >> SHIFT), mask=m_tile, other=0)
        end = gl.load(p_end + (gl.maximum(low, 0) >> SHIFT), mask=m_tile, other=0)
        m_tile = m_tile & ((low < 0) | (high < 0) | (start > first_key) | (end < first_key + BN))
        found = gl.maximum(found, gl.max(gl.where(m_tile, o_tile + 1, 0), 0))
    return found


@gluon.jit
def schedule(given, ENTRIES: gl.constexpr, SHIFT: gl.constexpr):
    """Draws parts of lists, copies their keys and values, and tells the others; −1 for the segment is the end."""
    (
        k_desc, v_desc, kv, items_ptr, parts_ptr, bad_ptr, counter_ptr, first_segment, SEGMENTS, M, BLOCKS, CHUNKS, G,
        GROUPS, order_ptr, start_ptr, end_ptr, window_b,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    BLOCK: gl.constexpr = k_ring.shape[1]
    total = _most_parts(parts_ptr, first_segment, SEGMENTS, BLOCKS) * SEGMENTS
    number = gl.program_id(0)
    turn = 0
    while number < total:
        after = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
        part, segment = number // SEGMENTS, number % SEGMENTS
        p_item = items_ptr + ((first_segment + segment).to(gl.int64) * M + part) * 4
        block = gl.load(p_item).to(gl.int32)
        start, stop = gl.load(p_item + 2).to(gl.int32), gl.load(p_item + 3).to(gl.int32)
        if start < stop:
            group = (first_segment + segment) // CHUNKS
            kv_head = group % G // GROUPS
            bad = gl.load(bad_ptr + (group // G * (G // GROUPS) + kv_head) * BLOCKS + block).to(gl.int32)
            o_bounds = group // G * window_b
            masked = _masked_tiles(
                order_ptr, start, stop, start_ptr + o_bounds, end_ptr + o_bounds, block * BLOCK, BLOCK, ENTRIES, SHIFT
            )
            at = turn % PLANS
            phase = ((turn // PLANS) & 1) ^ 1
            mbarrier.wait(plan_empty.index(at), phase)
            _tell(plan, plan_full, turn, segment, block, start, stop, part, bad, masked)
            mbarrier.wait(kv_empty.index(at), phase)
            mbarrier.expect(kv_full.index(at), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            copy_tile(k_desc, group // G, block * BLOCK, kv_head, kv_full.index(at), k_ring.index(at))
            copy_tile(v_desc, group // G, block * BLOCK, kv_head, kv_full.index(at), v_ring.index(at))
            turn += 1
        number = after
    mbarrier.wait(plan_empty.index(turn % PLANS), ((turn // PLANS) & 1) ^ 1)
    _tell(plan, plan_full, turn, -1, 0, 0, 0, 0, 0, 0)


@gluon.jit
def cleaned(tile, p_first, row_stride, ROWS, flags, LAYOUT: gl.constexpr):
    """Sets to 0 the rows of a tile in shared memory that are not finite, and notes NaN for them in ``flags``, else 0.

    The tile's values come from memory again, ROWS of them exist: another warpgroup may have cleaned the tile already.
    """
    N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    o_n, o_d = gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT)), gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    p_rows = p_first + o_n.to(gl.int64)[:, None] * row_stride + o_d[None, :]
    x = gl.load(p_rows, mask=(o_n < ROWS)[:, None], other=0.0)
    flag = gl.sum(x.to(gl.float32) * 0.0, 1)
    tile.store(gl.where((flag == 0.0)[:, None], x, 0.0).to(tile.dtype))
    flags.store(flag)
    fence_async_shared()


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
    o_e = o_m // HEADS
    o_row = (o_m % HEADS) * q_h
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
        o_entry = start + o_e
        entry = gl.load(order_ptr + o_entry, mask=o_entry < stop, other=-1)
        count = gl.cdiv(stop - start, ENTRIES)
        for i in range(count):
            o_entry += ENTRIES
            following = gl.load(order_ptr + o_entry, mask=o_entry < stop, other=-1)
            slot = (tile + i) % STAGES
            m_m = entry >= 0
            token = gl.where(m_m, entry, 0) >> SHIFT
            p_row = p_q + (token.to(gl.int64) * q_t + o_row)
            mbarrier.wait(q_empty.index(slot), (((tile + i) // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(q_ring.index(slot), p_row[:, None] + o_d[None, :], mask=m_m[:, None])
            async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
            entry = following
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, ONE)


@gluon.jit
def _consume(
    given, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, HEADS: gl.constexpr, SHIFT: gl.constexpr,
    CAPPED: gl.constexpr,
):  # fmt: skip
    (
        kv, rows, flag_ring, v_ptr, order_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, v_b, v_t, v_h, window_b,
        first_segment, S, G, GROUPS, N, GROUP, CHUNK, CHUNKS, inner, outer,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    q_ring, q_full, q_empty = rows
    STAGES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    ENTRIES: gl.constexpr = ROWS // HEADS
    BN: gl.constexpr = k_ring.shape[1]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    WIDE_ROW: gl.constexpr = gl.SliceLayout(1, WIDE)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.full([ROWS, BN], 0.0, gl.float32, layout=S_LAYOUT)
    nothing = gl.full([ROWS, DV], 0.0, gl.float32, layout=O_LAYOUT)
    o_m = gl.arange(0, ROWS, layout=ROW)
    o_wide = gl.arange(0, ROWS, layout=WIDE_ROW)
    o_column = gl.arange(0, DV, layout=gl.SliceLayout(0, WIDE))
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, ONE)
    while segment >= 0:
        at = turn % PLANS
        block = read_number(plan, at * NUMBERS + 1, ONE)
        first, stop = read_number(plan, at * NUMBERS + 2, ONE), read_number(plan, at * NUMBERS + 3, ONE)
        bad = read_number(plan, at * NUMBERS + 5, ONE)
        mbarrier.arrive(plan_empty.index(at), count=1)
        b, g = (first_segment + segment) // CHUNKS // G, (first_segment + segment) // CHUNKS % G
        p_start, p_end = start_ptr + b * window_b, end_ptr + b * window_b
        # The partial of an entry is number (segment · CHUNK + t − first query) · N + j of the launch.
        o_first = (segment - (first_segment + segment) % CHUNKS).to(gl.int64) * CHUNK * N
        o_k = block * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        count = gl.cdiv(stop - first, ENTRIES)
        i_first = (CONSUMER + CONSUMERS - tile % CONSUMERS) % CONSUMERS
        o_entry = first + i_first * ENTRIES + o_m // HEADS
        # Loads that depend on each other are a tile apart: entries of the tile after the next, bounds of the next.
        entry = gl.load(order_ptr + o_entry, mask=o_entry < stop, other=-1)
        start = gl.load(p_start + (gl.maximum(entry, 0) >> SHIFT))
        end = gl.load(p_end + (gl.maximum(entry, 0) >> SHIFT))
        o_entry += CONSUMERS * ENTRIES
        following = gl.load(order_ptr + o_entry, mask=o_entry < stop, other=-1)
        o_entry_wide = first + i_first * ENTRIES + o_wide // HEADS
        mbarrier.wait(kv_full.index(at), (turn // PLANS) & 1)
        k_tile, v_tile = k_ring.index(at), v_ring.index(at)
        if bad >= 2:
            p_v = v_ptr + b.to(gl.int64) * v_b + (g // GROUPS).to(gl.int64) * v_h + (block * BN).to(gl.int64) * v_t
            cleaned(v_tile, p_v, v_t, S - block * BN, flag_ring.index(CONSUMER), WIDE)
        for i in range(i_first, count, CONSUMERS):
            slot = (tile + i) % STAGES
            m_m = entry >= 0
            token = gl.where(m_m, entry, 0) >> SHIFT
            next_start = gl.load(p_start + (gl.maximum(following, 0) >> SHIFT))
            next_end = gl.load(p_end + (gl.maximum(following, 0) >> SHIFT))
            wide = gl.load(order_ptr + o_entry_wide, mask=o_entry_wide < stop, other=-1)
            o_entry += CONSUMERS * ENTRIES
            o_entry_wide += CONSUMERS * ENTRIES
            after = gl.load(order_ptr + o_entry, mask=o_entry < stop, other=-1)
            mbarrier.wait(q_full.index(slot), ((tile + i) // STAGES) & 1)
            fence_async_shared()
            s_started = product_nt(q_ring.index(slot), k_tile, zero)
            s = warpgroup_mma_wait(0, [s_started])
            mbarrier.arrive(q_empty.index(slot), count=1)
            z = softcapped(s, inner, CAPPED)
            m_seen = m_m[:, None] & within(o_k[None, :], start[:, None], end[:, None])
            z = gl.where(m_seen, z * outer, float("-inf"))
            row_max = gl.max(z, 1)
            p = gl.exp2(z - gl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
            if bad >= 2:  # rows that see a value that is not finite become NaN
                flag = flag_ring.index(CONSUMER).load(gl.SliceLayout(0, S_LAYOUT))
                p = gl.where(m_seen, p + flag[None, :], 0.0)
            row_sum = gl.sum(p, 1)
            acc_started = warpgroup_mma(
                gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT), v_tile, nothing, use_acc=False, is_async=True
            )
            m_empty = row_sum == 0.0
            row_sum = gl.where(m_empty, 1.0, row_sum)
            lse = gl.where(m_empty, float("-inf"), row_max + gl.log2(row_sum))
            o_nth = gl.where(m_m, entry, 0) & ((1 << SHIFT) - 1)
            o_partial = (o_first + token.to(gl.int64) * N + o_nth) * GROUP + o_m % HEADS
            gl.store(lse_ptr + o_partial, lse, mask=m_m)
            m_wide = wide >= 0
            wide = gl.where(m_wide, wide, 0)
            o_partial_wide = o_first + (wide >> SHIFT).to(gl.int64) * N + (wide & ((1 << SHIFT) - 1))
            p_out = out_ptr + (o_partial_wide * GROUP + o_wide % HEADS) * DV
            acc = warpgroup_mma_wait(0, [acc_started])
            out = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, O_LAYOUT))[:, None]
            out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), WIDE)
            gl.store(p_out[:, None] + o_column[None, :], out, mask=m_wide[:, None])
            entry = following
            following = after
            start = next_start
            end = next_end
        mbarrier.arrive(kv_empty.index(at), count=1)
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
    kv = (
        ring(k_desc, PLANS),
        ring(v_desc, PLANS),
        numbers(),
        barriers(PLANS, 1),
        barriers(PLANS, CONSUMERS + 1),
        barriers(PLANS, 1),
        barriers(PLANS, CONSUMERS),
    )
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
        first_segment, S, G, GROUPS, N, GROUP, CHUNK, CHUNKS, inner, outer,
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
                (schedule, (scheduled, ROWS // HEADS, SHIFT)),
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
                (schedule, (scheduled, ROWS // HEADS, SHIFT)),
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
