"""The backward pass of attention by windows on Hopper: see ``core/triton/hopper.py``.

dQ goes by tiles of queries over the keys, dK and dV by tiles of keys over the queries, so nothing is summed by atomics.
The scores of the keys' kernel are transposed: what is multiplied with d_out and q stays in registers.
"""

from typing import NamedTuple

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
    copy_tile,
    product_nt,
    ring,
    rows_of,
    softcapped,
    store_tile,
    tile_at,
    tiles_of,
    window_tiles,
    within,
)
from kernel_index.core.triton.jit import ENABLE_FP_FUSION
from kernel_index.core.triton.launch import ceil_div, on_device, row_stride, score_factors

CONSUMERS = gl.constexpr(2)


class Shape(NamedTuple):
    """Rows of the tiles that the producer copies, and slots of its ring."""

    step: int
    stages: int


SHAPES = {
    ("queries", 64): Shape(128, 3),
    ("queries", 128): Shape(64, 3),
    ("keys", 64): Shape(128, 2),
    ("keys", 128): Shape(64, 2),
}
"""Of a kernel and the wider of both head sizes: what needs no more registers than there are, timed on an H200."""


@gluon.jit
def _slope(z, CAPPED: gl.constexpr):
    """Of the softcap's tanh."""
    return 1.0 - z * z if CAPPED else 1.0


@gluon.jit
def _produce_keys(given):
    q_desc, do_desc, k_desc, v_desc, buffers, b, h, kv_head, first, low, left, full, right = given
    q_ring, do_ring, k_ring, v_ring, q_full, kv_full, kv_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    TILES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BN: gl.constexpr = k_ring.shape[1]
    mbarrier.expect(q_full.index(0), TILES * (q_desc.block_type.nbytes + do_desc.block_type.nbytes))
    for i in gl.static_range(TILES):
        copy_tile(q_desc, b, first + i * ROWS, h, q_full.index(0), q_ring.index(i))
        copy_tile(do_desc, b, first + i * ROWS, h, q_full.index(0), do_ring.index(i))
    for i in range(left + full + right):
        slot = i % STAGES
        first_key = tile_at(i, low, left, full, BN)
        mbarrier.wait(kv_empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(kv_full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        copy_tile(k_desc, b, first_key, kv_head, kv_full.index(slot), k_ring.index(slot))
        copy_tile(v_desc, b, first_key, kv_head, kv_full.index(slot), v_ring.index(slot))


@gluon.jit
def _score_grad(
    s, dp_started, delta, lse, start, end, first, masked, inner, outer, BN: gl.constexpr, CAPPED: gl.constexpr,
    PENDING: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dz = p · (dp − delta) [ROWS, BN], times the softcap's slope; ``dp`` is waited for as late as possible."""
    z = softcapped(s, inner, CAPPED)
    p = gl.exp2(z * outer - lse[:, None]) * _slope(z, CAPPED)
    if masked:
        o_k = first + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        p = gl.where(within(o_k[None, :], start[:, None], end[:, None]), p, 0.0)
    dp = warpgroup_mma_wait(PENDING, [dp_started])
    return p * (dp - delta[:, None])


@gluon.jit
def _consume_keys(given, CONSUMER: gl.constexpr, CAPPED: gl.constexpr, HAS_D_LSE: gl.constexpr):
    (
        buffers, start_ptr, end_ptr, p_out, p_do, p_d_lse, p_lse, p_delta, p_dq, out_t, do_t, dq_t, first, T, low, left,
        full, right, scale, inner, outer,
    ) = given  # fmt: skip
    q_ring, do_ring, k_ring, v_ring, q_full, kv_full, kv_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BN: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    DZ_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, Q_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    first = first + CONSUMER * ROWS
    o_wide = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    o_column = gl.arange(0, DV, layout=gl.SliceLayout(0, WIDE))
    m_wide = (o_wide < T)[:, None]
    b_out = gl.load(p_out + o_wide.to(gl.int64)[:, None] * out_t + o_column[None, :], mask=m_wide, other=0.0)
    b_do = gl.load(p_do + o_wide.to(gl.int64)[:, None] * do_t + o_column[None, :], mask=m_wide, other=0.0)
    delta = gl.convert_layout(gl.sum(b_out.to(gl.float32) * b_do.to(gl.float32), 1), ROW)
    o_q = first + gl.arange(0, ROWS, layout=ROW)
    m_q = o_q < T
    start = gl.load(start_ptr + o_q, mask=m_q, other=0)
    end = gl.load(end_ptr + o_q, mask=m_q, other=0)
    m_some = start < end
    if HAS_D_LSE:
        delta -= gl.load(p_d_lse + o_q, mask=m_q, other=0.0)
    delta = gl.where(m_some, delta, 0.0)
    gl.store(p_delta + o_q, delta, mask=m_q)
    lse = gl.where(m_some, gl.load(p_lse + o_q, mask=m_q, other=0.0), float("inf"))
    zero = gl.full([ROWS, BN], 0.0, gl.float32, layout=S_LAYOUT)
    dq = gl.full([ROWS, D], 0.0, gl.float32, layout=Q_LAYOUT)
    count = left + full + right
    mbarrier.wait(q_full.index(0), 0)  # also without keys: a program that ends gives its shared memory to the next
    if count > 0:
        mbarrier.wait(kv_full.index(0), 0)
        q_tile, do_tile = q_ring.index(CONSUMER), do_ring.index(CONSUMER)
        s_started = product_nt(q_tile, k_ring.index(0), zero)
        dp_started = product_nt(do_tile, v_ring.index(0), zero)
        s = warpgroup_mma_wait(1, [s_started])
        dz = _score_grad(
            s, dp_started, delta, lse, start, end, tile_at(0, low, left, full, BN), full == 0, inner, outer, BN, CAPPED,
            0, S_LAYOUT,
        )  # fmt: skip
        b_dz = gl.convert_layout(dz.to(k_ring.dtype), DZ_LAYOUT)
        for i in range(1, count):
            slot = i % STAGES
            before = (i - 1) % STAGES
            mbarrier.wait(kv_full.index(slot), (i // STAGES) & 1)
            s_started = product_nt(q_tile, k_ring.index(slot), zero)
            dp_started = product_nt(do_tile, v_ring.index(slot), zero)
            dq_started = warpgroup_mma(b_dz, k_ring.index(before), dq, is_async=True)
            s = warpgroup_mma_wait(2, [s_started])
            dz = _score_grad(
                s, dp_started, delta, lse, start, end, tile_at(i, low, left, full, BN), i >= full, inner, outer, BN,
                CAPPED, 1, S_LAYOUT,
            )  # fmt: skip
            dq = warpgroup_mma_wait(0, [dq_started])
            mbarrier.arrive(kv_empty.index(before), count=1)
            b_dz = gl.convert_layout(dz.to(k_ring.dtype), DZ_LAYOUT)
        dq_started = warpgroup_mma(b_dz, k_ring.index((count - 1) % STAGES), dq, is_async=True)
        dq = warpgroup_mma_wait(0, [dq_started])
    store_tile(p_dq, first, dq_t, dq * scale, T, D)


@HopperKernel
def _queries_kernel(
    q_desc, do_desc, k_desc, v_desc, d_out_ptr, d_lse_ptr, out_ptr, lse_ptr, start_ptr, end_ptr, dq_ptr, delta_ptr,
    do_b, do_t, do_h, window_b, lse_h, T, H, G, scale, inner, outer,
    STAGES: gl.constexpr, CAPPED: gl.constexpr, HAS_D_LSE: gl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, and its ``delta`` for the keys' kernel."""
    buffers = (
        ring(q_desc, CONSUMERS),
        ring(do_desc, CONSUMERS),
        ring(k_desc, STAGES),
        ring(v_desc, STAGES),
        barriers(1, 1),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
    )
    fence_async_shared()
    BN: gl.constexpr = k_desc.block_type.shape[1]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    ROWS: gl.constexpr = q_desc.block_type.shape[1]
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * (CONSUMERS * ROWS)
    b, h = gl.program_id(1) // H, gl.program_id(1) % H
    start_ptr += b * window_b
    end_ptr += b * window_b
    low, left, full, right = window_tiles(start_ptr, end_ptr, first, T, CONSUMERS * ROWS, BN)
    o_head = b.to(gl.int64) * T * H + h
    o_row = (b * H + h).to(gl.int64)
    if HAS_D_LSE:
        d_lse_ptr += o_row * T
    consumed = (
        buffers, start_ptr, end_ptr, out_ptr + o_head * DV, d_out_ptr + b.to(gl.int64) * do_b + h.to(gl.int64) * do_h,
        d_lse_ptr, lse_ptr + o_row * lse_h, delta_ptr + o_row * lse_h, dq_ptr + o_head * D, H * DV, do_t, H * D, first,
        T, low, left, full, right, scale, inner, outer,
    )  # fmt: skip
    produced = (q_desc, do_desc, k_desc, v_desc, buffers, b, h, h // G, first, low, left, full, right)
    gl.warp_specialize(
        [
            (_consume_keys, (consumed, 0, CAPPED, HAS_D_LSE)),
            (_consume_keys, (consumed, 1, CAPPED, HAS_D_LSE)),
            (_produce_keys, (produced,)),
        ],
        TWO[0],
        TWO[1],
    )


@gluon.jit
def _produce_queries(given):
    """The queries of the G heads of a group, one head after the other, with their ``lse`` and ``delta``."""
    (
        q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, buffers, b, H, kv_head, G, first, low, left, full, right,
    ) = given  # fmt: skip
    k_ring, v_ring, q_ring, do_ring, lse_ring, delta_ring, kv_full, q_full, q_empty = buffers
    STAGES: gl.constexpr = q_ring.shape[0]
    TILES: gl.constexpr = k_ring.shape[0]
    ROWS: gl.constexpr = k_ring.shape[1]
    BM: gl.constexpr = q_ring.shape[1]
    BYTES: gl.constexpr = q_desc.block_type.nbytes + do_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes
    mbarrier.expect(kv_full.index(0), TILES * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for i in gl.static_range(TILES):
        copy_tile(k_desc, b, first + i * ROWS, kv_head, kv_full.index(0), k_ring.index(i))
        copy_tile(v_desc, b, first + i * ROWS, kv_head, kv_full.index(0), v_ring.index(i))
    count = left + full + right
    for i in range(count * G):
        slot = i % STAGES
        h = kv_head * G + i // count
        first_query = tile_at(i % count, low, left, full, BM)
        barrier = q_full.index(slot)
        mbarrier.wait(q_empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(barrier, BYTES)
        copy_tile(q_desc, b, first_query, h, barrier, q_ring.index(slot))
        copy_tile(do_desc, b, first_query, h, barrier, do_ring.index(slot))
        tma.async_copy_global_to_shared(lse_desc, [b * H + h, first_query], barrier, lse_ring.index(slot))
        tma.async_copy_global_to_shared(delta_desc, [b * H + h, first_query], barrier, delta_ring.index(slot))


@gluon.jit
def _selected(x, first, start, end, BM: gl.constexpr, COLUMN: gl.constexpr):
    """x [ROWS, BM] of a tile of queries, 0 where the query does not see the key."""
    o_q = first + gl.arange(0, BM, layout=COLUMN)
    return gl.where(within(o_q[None, :], start[:, None], end[:, None]), x, 0.0)


@gluon.jit
def _consume_queries(given, CONSUMER: gl.constexpr, CAPPED: gl.constexpr):
    (
        buffers, start_ptr, end_ptr, p_dk, p_dv, dk_t, dv_t, first, S, G, low, left, full, right, scale, inner, outer,
    ) = given  # fmt: skip
    k_ring, v_ring, q_ring, do_ring, lse_ring, delta_ring, kv_full, q_full, q_empty = buffers
    STAGES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = k_ring.shape[1]
    BM: gl.constexpr = q_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    first = first + CONSUMER * ROWS
    o_k = first + gl.arange(0, ROWS, layout=ROW)
    start = gl.load(start_ptr + o_k, mask=o_k < S, other=0)
    end = gl.load(end_ptr + o_k, mask=o_k < S, other=0)
    zero = gl.full([ROWS, BM], 0.0, gl.float32, layout=S_LAYOUT)
    dk = gl.full([ROWS, D], 0.0, gl.float32, layout=K_LAYOUT)
    dv = gl.full([ROWS, DV], 0.0, gl.float32, layout=V_LAYOUT)
    count = left + full + right
    mbarrier.wait(kv_full.index(0), 0)
    k_tile, v_tile = k_ring.index(CONSUMER), v_ring.index(CONSUMER)
    for i in range(count * G):
        slot = i % STAGES
        mbarrier.wait(q_full.index(slot), (i // STAGES) & 1)
        s_started = product_nt(k_tile, q_ring.index(slot), zero)
        dp_started = product_nt(v_tile, do_ring.index(slot), zero)
        lse = lse_ring.index(slot).reshape([BM]).load(COLUMN)
        z = softcapped(warpgroup_mma_wait(1, [s_started]), inner, CAPPED)
        p = gl.exp2(z * outer - lse[None, :])
        masked = i % count >= full
        first_query = tile_at(i % count, low, left, full, BM)
        if masked:
            p = _selected(p, first_query, start, end, BM, COLUMN)
        b_p = gl.convert_layout(p.to(q_ring.dtype), gl.DotOperandLayout(0, V_LAYOUT, k_width=2))
        dv_started = warpgroup_mma(b_p, do_ring.index(slot), dv, is_async=True)
        p = p * _slope(z, CAPPED)
        dp = warpgroup_mma_wait(1, [dp_started])
        delta = delta_ring.index(slot).reshape([BM]).load(COLUMN)  # not before: there is no register for it
        dz = p * (dp - delta[None, :])
        if masked:  # 0 times a delta of NaN is not 0
            dz = _selected(dz, first_query, start, end, BM, COLUMN)
        b_dz = gl.convert_layout(dz.to(q_ring.dtype), gl.DotOperandLayout(0, K_LAYOUT, k_width=2))
        dk_started = warpgroup_mma(b_dz, q_ring.index(slot), dk, is_async=True)
        dv = warpgroup_mma_wait(1, [dv_started])
        dk = warpgroup_mma_wait(0, [dk_started])
        mbarrier.arrive(q_empty.index(slot), count=1)
    store_tile(p_dk, first, dk_t, dk * scale, S, D)
    store_tile(p_dv, first, dv_t, dv, S, DV)


@HopperKernel
def _keys_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, start_ptr, end_ptr, dk_ptr, dv_ptr, window_b, S, H, G, scale,
    inner, outer, STAGES: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one KV head; ``start`` and ``end`` bound the queries that see each key."""
    NUMBERS: gl.constexpr = lse_desc.layout
    BM: gl.constexpr = q_desc.block_type.shape[1]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    ROWS: gl.constexpr = k_desc.block_type.shape[1]
    buffers = (
        ring(k_desc, CONSUMERS),
        ring(v_desc, CONSUMERS),
        ring(q_desc, STAGES),
        ring(do_desc, STAGES),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], NUMBERS),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], NUMBERS),
        barriers(1, 1),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
    )
    fence_async_shared()
    first = gl.program_id(0) * (CONSUMERS * ROWS)
    K = H // G
    b, kv_head = gl.program_id(1) // K, gl.program_id(1) % K
    start_ptr += b * window_b
    end_ptr += b * window_b
    low, left, full, right = window_tiles(start_ptr, end_ptr, first, S, CONSUMERS * ROWS, BM)
    o_head = b.to(gl.int64) * S * K + kv_head
    consumed = (
        buffers, start_ptr, end_ptr, dk_ptr + o_head * D, dv_ptr + o_head * DV, K * D, K * DV, first, S, G, low, left,
        full, right, scale, inner, outer,
    )  # fmt: skip
    produced = (
        q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, buffers, b, H, kv_head, G, first, low, left, full, right,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume_queries, (consumed, 0, CAPPED)),
            (_consume_queries, (consumed, 1, CAPPED)),
            (_produce_queries, (produced,)),
        ],
        TWO[0],
        TWO[1],
    )


def backward_queries(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds:
    tuple[Tensor, Tensor], scale: float | None, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``outputs``: dQ, contiguous, and ``delta``, which lies as ``lse`` does."""
    (B, T, H, D), K = q.shape, k.shape[2]
    scale = D**-0.5 if scale is None else scale
    step, stages = SHAPES["queries", max(D, v.shape[3])]
    with on_device(q):
        _queries_kernel[(ceil_div(T, ROWS * CONSUMERS.value), B * H)](
            tiles_of(q, ROWS), tiles_of(d_out, ROWS), tiles_of(k, step), tiles_of(v, step), d_out, d_lse, out, lse,
            *bounds, *outputs, *d_out.stride()[:3], row_stride(bounds[0]), lse.stride(1), T, H, H // K, scale,
            *score_factors(scale, softcap), stages, softcap > 0, d_lse is not None, num_warps=4,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
    return outputs


def backward_keys(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, bounds: tuple[Tensor, Tensor],
    scale: float | None, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, S, K, D), H = k.shape, q.shape[2]
    scale = D**-0.5 if scale is None else scale
    step, stages = SHAPES["keys", max(D, v.shape[3])]
    with on_device(q):
        _keys_kernel[(ceil_div(S, ROWS * CONSUMERS.value), B * K)](
            tiles_of(q, step), tiles_of(d_out, step), tiles_of(k, ROWS), tiles_of(v, ROWS), rows_of(lse, step),
            rows_of(delta, step), *bounds, *outputs, row_stride(bounds[0]), S, H, H // K, scale,
            *score_factors(scale, softcap), stages, softcap > 0, num_warps=4,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
    return outputs
