"""The forward pass of attention by windows on Hopper: see ``core/triton/hopper.py``.

Programs stay: each draws the next tile of queries from a counter, and its producer begins to copy that tile while the
consumers finish the last one.
"""

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

from kernel_index.core.triton.hopper import (
    LOG2E,
    ROWS,
    THREE,
    TWO,
    HopperKernel,
    barriers,
    copy_tile,
    product_nt,
    ring,
    softcapped,
    store_tile,
    tile_at,
    tiles_of,
    window_tiles,
    within,
)
from kernel_index.core.triton.jit import ENABLE_FP_FUSION
from kernel_index.core.triton.launch import ceil_div, on_device, processors, row_stride, score_factors

KEYS = 128
"""Of a tile."""

CACHED = 24 << 20
"""Bytes of keys and values that programs work on at the same time, so that they stay in the L2 cache."""


@gluon.jit
def _place_of(number, n, H, heads, near):
    """The tile of queries and the head that come at a place in the order: heads whose keys fit the cache together, and
    among them the last tiles first, which have most keys in a causal mask."""
    section = number // (n * near)
    inside = number % (n * near)
    size = gl.minimum(near, heads - section * near)
    return n - 1 - inside // size, section * near + inside % size


@gluon.jit
def _produce(given):
    q_desc, k_desc, v_desc, buffers, start_ptr, end_ptr, counter_ptr, window_b, T, H, G, heads, near, total = given
    q_ring, k_ring, v_ring, plan, q_full, q_empty, k_full, k_empty, v_full, v_empty, plan_full, plan_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    TILES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BM: gl.constexpr = TILES * ROWS
    BN: gl.constexpr = k_ring.shape[1]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n = gl.cdiv(T, BM)
    number = gl.program_id(0)
    turn = 0
    at = 0
    while number < total:
        tile, head = _place_of(number, n, H, heads, near)
        first, b, h = tile * BM, head // H, head % H
        low, left, full, right = window_tiles(start_ptr + b * window_b, end_ptr + b * window_b, first, T, BM, BN)
        after = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
        mbarrier.wait(plan_empty.index(0), (turn & 1) ^ 1)
        plan.index(0).store(gl.full([1], number, gl.int32, layout=ONE))
        plan.index(1).store(gl.full([1], low, gl.int32, layout=ONE))
        plan.index(2).store(gl.full([1], left, gl.int32, layout=ONE))
        plan.index(3).store(gl.full([1], full, gl.int32, layout=ONE))
        plan.index(4).store(gl.full([1], right, gl.int32, layout=ONE))
        mbarrier.arrive(plan_full.index(0), count=1)
        mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(q_full.index(0), TILES * q_desc.block_type.nbytes)
        for i in gl.static_range(TILES):
            copy_tile(q_desc, b, first + i * ROWS, h, q_full.index(0), q_ring.index(i))
        for i in range(left + full + right):
            slot = at % STAGES
            phase = ((at // STAGES) & 1) ^ 1
            first_key = tile_at(i, low, left, full, BN)
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            copy_tile(k_desc, b, first_key, h // G, k_full.index(slot), k_ring.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            copy_tile(v_desc, b, first_key, h // G, v_full.index(slot), v_ring.index(slot))
            at += 1
        number = after
        turn += 1
    mbarrier.wait(plan_empty.index(0), (turn & 1) ^ 1)
    plan.index(0).store(gl.full([1], total, gl.int32, layout=ONE))
    mbarrier.arrive(plan_full.index(0), count=1)


@gluon.jit
def _online_softmax(
    s, row_max, row_sum, start, end, first, masked, inner, outer, BN: gl.constexpr, CAPPED: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """See ``online_softmax`` of ``core/triton/attention.py``; ``row_max`` is of the scores, before ``outer``."""
    s = softcapped(s, inner, CAPPED)
    if masked:
        o_k = first + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(within(o_k[None, :], start[:, None], end[:, None]), s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1))
    shift = gl.where(new_max == float("-inf"), 0.0, new_max * outer)
    p = gl.exp2(s * outer - shift[:, None])
    alpha = gl.exp2(row_max * outer - shift)
    return p, alpha, new_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def _number(plan, i: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.sum(plan.index(i).load(LAYOUT), 0)


@gluon.jit
def _consume(given, CONSUMER: gl.constexpr, CAPPED: gl.constexpr, HAS_SINK: gl.constexpr):
    (
        buffers, start_ptr, end_ptr, sink_ptr, out_ptr, lse_ptr, window_b, lse_h, T, H, heads, near, total, inner,
        outer,
    ) = given  # fmt: skip
    q_ring, k_ring, v_ring, plan, q_full, q_empty, k_full, k_empty, v_full, v_empty, plan_full, plan_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BM: gl.constexpr = q_ring.shape[0] * ROWS
    BN: gl.constexpr = k_ring.shape[1]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    n = gl.cdiv(T, BM)
    turn = 0
    at = 0
    mbarrier.wait(plan_full.index(0), 0)
    number = _number(plan, 0, ONE)
    while number < total:
        low, left = _number(plan, 1, ONE), _number(plan, 2, ONE)
        full, right = _number(plan, 3, ONE), _number(plan, 4, ONE)
        mbarrier.arrive(plan_empty.index(0), count=1)
        tile, head = _place_of(number, n, H, heads, near)
        b = head // H
        first = tile * BM + CONSUMER * ROWS
        o_q = first + gl.arange(0, ROWS, layout=ROW)
        start = gl.load(start_ptr + b * window_b + o_q, mask=o_q < T, other=0)
        end = gl.load(end_ptr + b * window_b + o_q, mask=o_q < T, other=0)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
        row_sum = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
        zero = gl.full([ROWS, BN], 0.0, gl.float32, layout=S_LAYOUT)
        acc = gl.full([ROWS, DV], 0.0, gl.float32, layout=O_LAYOUT)
        count = left + full + right
        mbarrier.wait(q_full.index(0), turn & 1)
        q_tile = q_ring.index(CONSUMER)
        if count > 0:
            slot = at % STAGES
            mbarrier.wait(k_full.index(slot), (at // STAGES) & 1)
            s_started = product_nt(q_tile, k_ring.index(slot), zero)
            s = warpgroup_mma_wait(0, [s_started])
            mbarrier.arrive(k_empty.index(slot), count=1)
            p, alpha, row_max, row_sum = _online_softmax(
                s, row_max, row_sum, start, end, tile_at(0, low, left, full, BN), full == 0, inner, outer, BN, CAPPED,
                S_LAYOUT,
            )  # fmt: skip
            b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
            for i in range(1, count):
                before = (at + i - 1) % STAGES
                slot = (at + i) % STAGES
                mbarrier.wait(k_full.index(slot), ((at + i) // STAGES) & 1)
                s_started = product_nt(q_tile, k_ring.index(slot), zero)
                mbarrier.wait(v_full.index(before), ((at + i - 1) // STAGES) & 1)
                acc_started = warpgroup_mma(b_p, v_ring.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, [s_started])
                mbarrier.arrive(k_empty.index(slot), count=1)
                p, alpha, row_max, row_sum = _online_softmax(
                    s, row_max, row_sum, start, end, tile_at(i, low, left, full, BN), i >= full, inner, outer, BN,
                    CAPPED, S_LAYOUT,
                )  # fmt: skip
                acc = warpgroup_mma_wait(0, [acc_started])
                mbarrier.arrive(v_empty.index(before), count=1)
                acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
                b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
            at += count
            slot = (at - 1) % STAGES
            mbarrier.wait(v_full.index(slot), ((at - 1) // STAGES) & 1)
            acc_started = warpgroup_mma(b_p, v_ring.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc_started])
            mbarrier.arrive(v_empty.index(slot), count=1)
        mbarrier.arrive(q_empty.index(0), count=1)
        m_empty = start >= end
        row_max = row_max * outer
        if HAS_SINK:  # the sink logit is part of the denominator of every query that has a key
            sink = gl.load(sink_ptr + head % H).to(gl.float32) * LOG2E
            new_max = gl.where(m_empty, 0.0, gl.maximum(row_max, sink))
            alpha = gl.exp2(row_max - new_max)
            acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
            row_sum = row_sum * alpha + gl.exp2(sink - new_max)
            row_max = new_max
        row_sum = gl.where(m_empty, 1.0, row_sum)
        lse = gl.where(m_empty, float("-inf"), row_max + gl.log2(row_sum))
        gl.store(lse_ptr + head.to(gl.int64) * lse_h + o_q, lse, mask=o_q < T)
        out = acc / gl.convert_layout(row_sum, OUT_ROW)[:, None]
        p_out = out_ptr + (b.to(gl.int64) * T * H + head % H) * DV
        store_tile(p_out, first, H * DV, out, T, DV)
        turn += 1
        mbarrier.wait(plan_full.index(0), turn & 1)
        number = _number(plan, 0, ONE)


@HopperKernel
def _forward_kernel(
    q_desc, k_desc, v_desc, sink_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, counter_ptr, window_b, lse_h, T, H, G,
    heads, near, total, inner, outer,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    """``total`` tiles of queries of all ``heads``, B · H; ``near`` heads are worked on together."""
    ONES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = (
        ring(q_desc, CONSUMERS),
        ring(k_desc, STAGES),
        ring(v_desc, STAGES),
        gl.allocate_shared_memory(gl.int32, [5, 1], ONES),
        barriers(1, 1),
        barriers(1, CONSUMERS),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
        barriers(1, 1),
        barriers(1, CONSUMERS),
    )
    fence_async_shared()
    consumed = (
        buffers, start_ptr, end_ptr, sink_ptr, out_ptr, lse_ptr, window_b, lse_h, T, H, heads, near, total, inner,
        outer,
    )  # fmt: skip
    produced = (
        q_desc, k_desc, v_desc, buffers, start_ptr, end_ptr, counter_ptr, window_b, T, H, G, heads, near, total,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (consumed, 0, CAPPED, HAS_SINK)),
                (_consume, (consumed, 1, CAPPED, HAS_SINK)),
                (_produce, (produced,)),
            ],
            TWO[0],
            TWO[1],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consumed, 0, CAPPED, HAS_SINK)),
                (_consume, (consumed, 1, CAPPED, HAS_SINK)),
                (_consume, (consumed, 2, CAPPED, HAS_SINK)),
                (_produce, (produced,)),
            ],
            THREE[0],
            THREE[1],
        )


def forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bounds: tuple[Tensor, Tensor], scale: float | None, softcap:
    float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``outputs``: out [B, T, H, Dv], contiguous, and the log-sum-exp of base 2 [B, H, T], whose rows may have gaps."""
    (B, T, H, D), (S, K), DV = q.shape, k.shape[1:3], v.shape[3]
    inner, outer = score_factors(D**-0.5 if scale is None else scale, softcap)
    narrow = max(D, DV) <= 64
    consumers, stages = (3, 3) if narrow else (2, 2)
    total = B * H * ceil_div(T, ROWS * consumers)
    near = max(1, CACHED // max(1, S * (D + DV) * k.element_size())) * (H // K)
    with on_device(q):
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
        _forward_kernel[(min(total, processors(q)),)](
            tiles_of(q, ROWS), tiles_of(k, KEYS), tiles_of(v, KEYS), sink, *bounds, *outputs, counter,
            row_stride(bounds[0]), outputs[1].stride(1), T, H, H // K, B * H, min(near, B * H), total, inner, outer,
            consumers, stages, softcap > 0, sink is not None, num_warps=4, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
    return outputs
