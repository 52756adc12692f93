"""The kernels of ``triton.py`` and ``triton_backward.py`` that go by unions, on Hopper: warps with roles.

A program takes a tile of queries, of which each of its two consumers, a warpgroup, has one half: 64 rows, a row being
one query with one head of the group.  One warp copies the blocks of the tile's union, once for both.  A consumer skips
blocks that none of its own queries selected.  While one waits for a copy, the other multiplies.  Names and units are
those of ``core/triton/attention.py``.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernel_index.core.triton.hopper import (
    ROWS,
    TWO,
    HopperKernel,
    barriers,
    computed_before,
    copy_tile,
    has_tiles,
    product_nt,
    ring,
    softcapped,
    tiles_of,
    within,
)
from kernel_index.core.triton.jit import ENABLE_FP_FUSION
from kernel_index.core.triton.launch import AttentionLaunch, ceil_div, on_device, processors, row_stride
from kernel_index.kernels.sparse.block_sparse_attention.plan import Plan
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_parts import (
    CHUNK,
    CHUNKS,
    INFO,
    cleaned,
    noted,
    read_number,
)
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_rows import (
    CONSUMERS,
    inner_bounds,
    row_place,
    row_ring,
    rows_of,
    store_rows,
    wide,
)
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_union_forward import consume_forward


@gluon.jit
def _put(info, i, value):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    info.index(i).store(gl.full([1], 0, gl.int32, layout=ONE) + value)


@gluon.jit
def _copy_rows(given):
    """Those of a tile, when the consumers have done with the tile before."""
    row_descs, row_rings, q_full, q_empty, turn, b, tile, head, QUERIES = given
    mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
    for r in gl.static_range(len(row_descs)):
        mbarrier.expect(q_full.index(0), CONSUMERS * row_descs[r].block_type.nbytes)
        for i in gl.static_range(CONSUMERS):
            target = (
                row_rings[r]
                .index(i)
                ._reinterpret(row_descs[r].dtype, row_descs[r].block_type.shape, row_descs[r].layout)
            )
            first = (tile * CONSUMERS + i) * QUERIES
            tma.async_copy_global_to_shared(row_descs[r], [b, first, head, 0], q_full.index(0), target)


@gluon.jit
def _produce(given):
    (
        row_descs, k_desc, v_desc, row_rings, buffers, blocks_ptr, members_ptr, sizes_ptr, bad_ptr, counter_ptr, TILES,
        UNION, G, GROUPS, GROUP, BLOCKS, total, QUERIES,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, info, plan_full, plan_empty, q_full, q_empty, kv_full, kv_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK: gl.constexpr = k_ring.shape[1]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    number = gl.program_id(0)
    turn = 0
    at = 0
    chunk = 0
    while number < total:
        after = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        group, tile = number // TILES, TILES - 1 - number % TILES  # the long unions of a causal mask begin first
        size = gl.load(sizes_ptr + group * TILES + tile)
        if size >= 0:  # else lists take the tile
            b, g = group // G, group % G
            kv_head = g // GROUPS
            mbarrier.wait(plan_empty.index(0), (turn & 1) ^ 1)
            _put(plan, 0, number)
            _put(plan, 1, size)
            mbarrier.arrive(plan_full.index(0), count=1)
            rows = row_descs, row_rings, q_full, q_empty, turn, b, tile, g * GROUP, QUERIES
            if size == 0:
                _copy_rows(rows)
            p_blocks = blocks_ptr + (group * TILES + tile).to(gl.int64) * UNION
            p_members = members_ptr + (group * TILES + tile).to(gl.int64) * UNION
            p_bad = bad_ptr + (b * (G // GROUPS) + kv_head) * BLOCKS
            for first_of_chunk in range(0, size, CHUNK):
                notes = chunk % CHUNKS * INFO
                o_block = first_of_chunk + gl.arange(0, CHUNK, layout=ONE)
                block = gl.load(p_blocks + o_block, mask=o_block < size, other=0)
                members = gl.load(p_members + o_block, mask=o_block < size, other=0)
                info.index(notes).store(block)
                info.index(notes + 1).store(((members << (64 - QUERIES)) >> (64 - QUERIES)).to(gl.int32))
                info.index(notes + 2).store((members >> QUERIES).to(gl.int32))
                info.index(notes + 3).store(gl.load(p_bad + block).to(gl.int32))
                for nth in range(gl.minimum(size - first_of_chunk, CHUNK)):
                    slot = at % STAGES
                    first_key = noted(info, chunk, 0, nth, ONE) * BLOCK
                    mbarrier.wait(kv_empty.index(slot), ((at // STAGES) & 1) ^ 1)
                    mbarrier.expect(kv_full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                    copy_tile(k_desc, b, first_key, kv_head, kv_full.index(slot), k_ring.index(slot))
                    copy_tile(v_desc, b, first_key, kv_head, kv_full.index(slot), v_ring.index(slot))
                    if first_of_chunk + nth == 0:  # so that the first block comes while the last tile is in work
                        _copy_rows(rows)
                    at += 1
                chunk += 1
            turn += 1
        number = after
    mbarrier.wait(plan_empty.index(0), (turn & 1) ^ 1)
    _put(plan, 0, total)
    _put(plan, 1, 0)
    mbarrier.arrive(plan_full.index(0), count=1)


@gluon.jit
def _consume_queries(given, CONSUMER: gl.constexpr, HEADS: gl.constexpr, CAPPED: gl.constexpr):
    (
        row_rings, buffers, flag_ring, k_ptr, _v_ptr, start_ptr, end_ptr, dq_ptr, lse_ptr, delta_ptr, k_b, k_t, k_h,
        window_b, TILES, T, S, H, G, GROUPS, GROUP, total, QUERIES, scale, inner, outer,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, info, plan_full, plan_empty, q_full, q_empty, kv_full, kv_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    BN: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    WIDE: gl.constexpr = wide(D)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.full([64, BN], 0.0, gl.float32, layout=S_LAYOUT)
    o_local = gl.arange(0, 64, layout=ROW) // HEADS
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
        o_row = (b.to(gl.int64) * T + o_q) * H + o_h
        lse = gl.load(lse_ptr + o_row, mask=o_q < T, other=float("inf"))
        lse = gl.where(lse == float("-inf"), float("inf"), lse)  # no gradient where there is no key
        delta = gl.load(delta_ptr + o_row, mask=o_q < T, other=0.0)
        dq = gl.full([64, D], 0.0, gl.float32, layout=Q_LAYOUT)
        mbarrier.wait(q_full.index(0), turn & 1)
        q_tile, do_tile = row_rings[0].index(CONSUMER), row_rings[1].index(CONSUMER)
        for i in range(size):
            slot = at % STAGES
            notes = chunk + i // CHUNK
            mbarrier.wait(kv_full.index(slot), (at // STAGES) & 1)
            bits = noted(info, notes, 1 + CONSUMER, i, ONE)
            if bits != 0:
                first_key, bad = noted(info, notes, 0, i, ONE) * BN, noted(info, notes, 3, i, ONE)
                if bad % 2 == 1:
                    p_k = k_ptr + b.to(gl.int64) * k_b + (g // GROUPS) * k_h + first_key.to(gl.int64) * k_t
                    cleaned(k_ring.index(slot), p_k, k_t, S - first_key, flag_ring.index(CONSUMER), WIDE)
                s_started = product_nt(q_tile, k_ring.index(slot), zero)
                dp_started = product_nt(do_tile, v_ring.index(slot), zero)
                s = warpgroup_mma_wait(1, [s_started])
                z = softcapped(s, inner, CAPPED)
                p = gl.exp2(z * outer - lse[:, None])
                if CAPPED:
                    p = p * (1.0 - z * z)
                computed_before(kv_full.index(slot), (at // STAGES) & 1)
                dp = warpgroup_mma_wait(0, [dp_started])
                dz = p * (dp - delta[:, None])
                if bad % 2 == 1:  # rows that see a key that is not finite become NaN
                    dz += flag_ring.index(CONSUMER).load(gl.SliceLayout(0, S_LAYOUT))[None, :]
                dz = gl.where((((bits >> o_local) & 1) != 0)[:, None], dz, 0.0)
                if (first_key < low) | (first_key + BN > high) | (bad != 0):
                    o_k = first_key + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
                    dz = gl.where(within(o_k[None, :], start[:, None], end[:, None]), dz, 0.0)
                b_dz = gl.convert_layout(dz.to(k_ring.dtype), gl.DotOperandLayout(0, Q_LAYOUT, k_width=2))
                dq = warpgroup_mma_wait(0, [warpgroup_mma(b_dz, k_ring.index(slot), dq, is_async=True)])
            mbarrier.arrive(kv_empty.index(slot), count=1)
            at += 1
        chunk += gl.cdiv(size, CHUNK)
        mbarrier.arrive(q_empty.index(0), count=1)
        _, _, _, w_q, w_h = row_place(number, TILES, G, GROUP, QUERIES, HEADS, CONSUMER, gl.SliceLayout(1, WIDE))
        store_rows(dq_ptr, dq * scale, b, w_q, w_h, T, H, WIDE)
        turn += 1
        mbarrier.wait(plan_full.index(0), turn & 1)
        number = read_number(plan, 0, ONE)


@HopperKernel
def _by_unions_kernel(
    q_desc, do_desc, k_desc, v_desc, k_ptr, v_ptr, blocks_ptr, members_ptr, sizes_ptr, bad_ptr, start_ptr, end_ptr,
    out_ptr, lse_ptr, delta_ptr, counter_ptr, x_b, x_t, x_h, window_b, TILES, UNION, T, S, H, G, GROUPS, GROUP, BLOCKS,
    total, QUERIES, scale, inner, outer,
    HEADS: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr, FORWARD: gl.constexpr,
):  # fmt: skip
    """``total`` tiles of all groups, TILES of each; QUERIES of a consumer.

    FORWARD: the output and the log-sum-exp; else dQ.  ``x_b, x_t, x_h``: strides of what is summed, values or keys.
    """
    ONES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BN: gl.constexpr = k_desc.block_type.shape[1]
    if FORWARD:
        row_descs = (q_desc,)
        row_rings = (row_ring(q_desc, CONSUMERS),)
    else:
        row_descs = (q_desc, do_desc)
        row_rings = (row_ring(q_desc, CONSUMERS), row_ring(do_desc, CONSUMERS))
    buffers = (
        ring(k_desc, STAGES),
        ring(v_desc, STAGES),
        gl.allocate_shared_memory(gl.int32, [2, 1], ONES),
        gl.allocate_shared_memory(gl.int32, [CHUNKS * INFO, CHUNK], ONES),
        barriers(1, 1),
        barriers(1, CONSUMERS),
        barriers(1, 1 if FORWARD else 2),
        barriers(1, CONSUMERS),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
    )
    flag_ring = gl.allocate_shared_memory(gl.float32, [CONSUMERS, BN], ONES)
    fence_async_shared()
    consumed = (
        row_rings, buffers, flag_ring, k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, delta_ptr, x_b, x_t, x_h,
        window_b, TILES, T, S, H, G, GROUPS, GROUP, total, QUERIES, scale, inner, outer,
    )  # fmt: skip
    produced = (
        row_descs, k_desc, v_desc, row_rings, buffers, blocks_ptr, members_ptr, sizes_ptr, bad_ptr, counter_ptr, TILES,
        UNION, G, GROUPS, GROUP, BLOCKS, total, QUERIES,
    )  # fmt: skip
    if FORWARD:
        gl.warp_specialize(
            [
                (consume_forward, (consumed, 0, HEADS, CAPPED)),
                (consume_forward, (consumed, 1, HEADS, CAPPED)),
                (_produce, (produced,)),
            ],
            TWO[0],
            TWO[1],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_queries, (consumed, 0, HEADS, CAPPED)),
                (_consume_queries, (consumed, 1, HEADS, CAPPED)),
                (_produce, (produced,)),
            ],
            TWO[0],
            TWO[1],
        )


STAGES = {True: 5, False: 4}
"""Slots of the ring of blocks, forward and backward."""


def _launch(q, d_out, k, v, plan, bounds, bad, launch, out, of_rows):
    c, (B, T, H, _), (S, K) = launch.constants, q.shape, k.shape[1:3]
    (G, tiles, union), forward = plan.blocks.shape[1:], d_out is None
    total, queries, blocks = B * G * tiles, ROWS // c["HEADS"], ceil_div(S, c["BLOCK"])
    if total == 0:
        return
    q, k, v = (x if has_tiles(x) else x.contiguous() for x in (q, k, v))
    d_out = d_out if forward or has_tiles(d_out) else d_out.contiguous()
    summed = v if forward else k
    with on_device(k):
        counter = torch.zeros(1, dtype=torch.int32, device=k.device)
        _by_unions_kernel[(min(total, processors(k)),)](
            rows_of(q, queries, c["HEADS"]), None if forward else rows_of(d_out, queries, c["HEADS"]),
            tiles_of(k, c["BLOCK"]), tiles_of(v, c["BLOCK"]), k, v, plan.blocks, plan.members, plan.sizes, bad, *bounds,
            out, *of_rows, counter, *summed.stride()[:3], row_stride(bounds[0]), tiles, union, T, S, H, G, G // K,
            c["GROUP"], blocks, total, queries, launch.scale, launch.inner, launch.outer, c["HEADS"], STAGES[forward],
            c["CAPPED"], forward, num_warps=4, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, bounds: tuple[Tensor, Tensor], bad: Tensor, launch: AttentionLaunch,
    outputs: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill ``out`` [B, T, H, Dv] and the log-sum-exp, base 2, [B, T, H] of tiles that go by unions.

    ``bad``: see ``unfit_blocks``.
    """
    _launch(q, None, k, v, plan, bounds, bad, launch, outputs[0], (outputs[1], None))


def backward_queries(
    of_rows: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, plan: Plan,
    bounds: tuple[Tensor, Tensor], bad: Tensor, launch: AttentionLaunch, d_q: Tensor,
) -> None:  # fmt: skip
    """Fill dQ of tiles that go by unions.  ``of_rows``: the gradient of the output, the log-sum-exp and ``delta``."""
    _launch(q, of_rows[0], k, v, plan, bounds, bad, launch, d_q, of_rows[1:])
