"""dQ of documents on Hopper: see ``hopper_documents.py``."""

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
    ROWS,
    TWO,
    QuickHopperKernel,
    barriers,
    copy_tile,
    product_nt,
    ring,
    store_tile,
    tiles_of,
)
from kernel_index.core.triton.hopper_documents import (
    CONSUMERS,
    Shape,
    first_token,
    is_masked,
    plan_memory,
    plan_walk,
    seen,
    segments,
    sight_of,
)
from kernel_index.core.triton.launch import ceil_div, on_device, row_stride, score_factors

SHAPES = {64: Shape(128, 3), 128: Shape(64, 3)}
"""Of the wider of both head sizes.  Steps are multiples of 16, so bits do not depend on them."""


@gluon.jit
def _produce_keys(given):
    q_desc, do_desc, k_desc, v_desc, buffers, documents, b, h, kv_head, first = given
    q_ring, do_ring, k_ring, v_ring, plan, q_full, kv_full, kv_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    TILES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BN: gl.constexpr = k_ring.shape[1]
    mbarrier.expect(q_full.index(0), TILES * (q_desc.block_type.nbytes + do_desc.block_type.nbytes))
    for tile in gl.static_range(TILES):
        copy_tile(q_desc, b, first + tile * ROWS, h, q_full.index(0), q_ring.index(tile))
        copy_tile(do_desc, b, first + tile * ROWS, h, q_full.index(0), do_ring.index(tile))
    at = 0
    for document in range(documents):
        o = first_token(plan, document, 1)
        begin, count = segments(plan, document, 1)
        for i in range(count):
            slot = at % STAGES
            mbarrier.wait(kv_empty.index(slot), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(kv_full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            copy_tile(k_desc, b, o + (begin + i) * BN, kv_head, kv_full.index(slot), k_ring.index(slot))
            copy_tile(v_desc, b, o + (begin + i) * BN, kv_head, kv_full.index(slot), v_ring.index(slot))
            at += 1


@gluon.jit
def _row_grad(
    s, dp_started, delta, lse, sight, j, bounds, outer, BN: gl.constexpr,
    PENDING: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dz [ROWS, BN] of the j-th segment; ``dp`` is waited for as late as possible."""
    p = gl.exp2(gl.fma(s, outer, -lse[:, None]))
    dp = warpgroup_mma_wait(PENDING, [dp_started])
    dz = p * (dp - delta[:, None])
    if is_masked(sight, j):
        o_i, p_start, p_end = bounds
        dz = gl.where(seen(sight, j, o_i, p_start, p_end, BN, S_LAYOUT), dz, 0.0)
    return dz


@gluon.jit
def _delta(pointers, first, T, do_t, DV: gl.constexpr, ROWS: gl.constexpr):
    """Σ d_out · out of ROWS rows."""
    p_out, p_do = pointers
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    o_row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    o_column = gl.arange(0, DV, layout=gl.SliceLayout(0, WIDE))
    o_tile = o_row.to(gl.int64)[:, None] * do_t + o_column[None, :]
    b_out = gl.load(p_out + o_tile, mask=(o_row < T)[:, None], other=0.0)
    b_do = gl.load(p_do + o_tile, mask=(o_row < T)[:, None], other=0.0)
    return gl.sum(b_out.to(gl.float32) * b_do.to(gl.float32), 1)


@gluon.jit
def _consume_keys(given, CONSUMER: gl.constexpr, HAS_D_LSE: gl.constexpr):
    (
        buffers, documents, start_ptr, end_ptr, pointers, p_d_lse, p_lse, p_delta, p_dq, do_t, dq_t, first, T, H, scale,
        outer,
    ) = given  # fmt: skip
    q_ring, do_ring, k_ring, v_ring, plan, q_full, kv_full, kv_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BN: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    DZ_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, Q_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    o_i = CONSUMER * ROWS + gl.arange(0, ROWS, layout=ROW)
    o_q = first + o_i
    m_q = o_q < T
    m_some = gl.load(start_ptr + o_q, mask=m_q, other=0) < gl.load(end_ptr + o_q, mask=m_q, other=0)
    delta = gl.convert_layout(_delta(pointers, first + CONSUMER * ROWS, T, do_t, DV, ROWS), ROW)
    if HAS_D_LSE:
        delta -= gl.load(p_d_lse + o_q.to(gl.int64) * H, mask=m_q, other=0.0)
    delta = gl.where(m_some, delta, 0.0)
    gl.store(p_delta + o_q, delta, mask=m_q)
    lse = gl.where(m_some, gl.load(p_lse + o_q, mask=m_q, other=0.0), float("inf"))
    bounds = (o_i, start_ptr + first, end_ptr + first)
    zero = gl.full([ROWS, BN], 0.0, gl.float32, layout=S_LAYOUT)
    dq = gl.full([ROWS, D], 0.0, gl.float32, layout=Q_LAYOUT)
    mbarrier.wait(q_full.index(0), 0)  # also without keys: a program that ends gives its shared memory to the next
    q_tile, do_tile = q_ring.index(CONSUMER), do_ring.index(CONSUMER)
    at = 0
    for document in range(documents):
        begin, count = segments(plan, document, 4)
        sight = sight_of(plan, document, 4)
        if count > 0:
            slot = at % STAGES
            mbarrier.wait(kv_full.index(slot), (at // STAGES) & 1)
            s_started = product_nt(q_tile, k_ring.index(slot), zero)
            dp_started = product_nt(do_tile, v_ring.index(slot), zero)
            s = warpgroup_mma_wait(1, [s_started])
            dz = _row_grad(s, dp_started, delta, lse, sight, begin, bounds, outer, BN, 0, S_LAYOUT)
            b_dz = gl.convert_layout(dz.to(k_ring.dtype), DZ_LAYOUT)
            for i in range(1, count):
                after = (at + i) % STAGES
                mbarrier.wait(kv_full.index(after), ((at + i) // STAGES) & 1)
                s_started = product_nt(q_tile, k_ring.index(after), zero)
                dp_started = product_nt(do_tile, v_ring.index(after), zero)
                dq_started = warpgroup_mma(b_dz, k_ring.index(slot), dq, is_async=True)
                s = warpgroup_mma_wait(2, [s_started])
                dz = _row_grad(s, dp_started, delta, lse, sight, begin + i, bounds, outer, BN, 1, S_LAYOUT)
                dq = warpgroup_mma_wait(0, [dq_started])
                mbarrier.arrive(kv_empty.index(slot), count=1)
                b_dz = gl.convert_layout(dz.to(k_ring.dtype), DZ_LAYOUT)
                slot = after
            dq_started = warpgroup_mma(b_dz, k_ring.index(slot), dq, is_async=True)
            dq = warpgroup_mma_wait(0, [dq_started])
            mbarrier.arrive(kv_empty.index(slot), count=1)
            at += count
    store_tile(p_dq, first + CONSUMER * ROWS, dq_t, dq * scale, T, D)


@QuickHopperKernel
def _queries_kernel(
    q_desc, do_desc, k_desc, v_desc, d_out_ptr, d_lse_ptr, out_ptr, lse_ptr, start_ptr, end_ptr, origin_ptr, dq_ptr,
    delta_ptr, bounds_b, lse_h, T, H, G, scale, outer,
    STAGES: gl.constexpr, HAS_D_LSE: gl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, and its ``delta`` for the keys' kernel."""
    BN: gl.constexpr = k_desc.block_type.shape[1]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    BM: gl.constexpr = CONSUMERS * q_desc.block_type.shape[1]
    buffers = (
        ring(q_desc, CONSUMERS),
        ring(do_desc, CONSUMERS),
        ring(k_desc, STAGES),
        ring(v_desc, STAGES),
        plan_memory(BM),
        barriers(1, 1),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
    )
    fence_async_shared()
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * BM  # the long rows of a causal mask begin first
    b, h = gl.program_id(1) // H, gl.program_id(1) % H
    start_ptr += b * bounds_b
    end_ptr += b * bounds_b
    documents = plan_walk(buffers[4], start_ptr, end_ptr, origin_ptr + b * bounds_b, first, T, BM, BN)
    o_head = b.to(gl.int64) * T * H + h
    o_number = (b * H + h).to(gl.int64) * lse_h
    pointers = (out_ptr + o_head * DV, d_out_ptr + o_head * DV)
    p_d_lse = d_lse_ptr + o_head if HAS_D_LSE else delta_ptr
    consumed = (
        buffers, documents, start_ptr, end_ptr, pointers, p_d_lse, lse_ptr + o_number, delta_ptr + o_number,
        dq_ptr + o_head * D, H * DV, H * D, first, T, H, scale, outer,
    )  # fmt: skip
    produced = (q_desc, do_desc, k_desc, v_desc, buffers, documents, b, h, h // G, first)
    gl.warp_specialize(
        [
            (_consume_keys, (consumed, 0, HAS_D_LSE)),
            (_consume_keys, (consumed, 1, HAS_D_LSE)),
            (_produce_keys, (produced,)),
        ],
        TWO[0],
        TWO[1],
    )


def backward_queries(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bounds: tuple[Tensor, ...], scale: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dQ and ``delta``, which lies as ``lse`` does; ``bounds``: start, end and origin of queries; all is dense."""
    (B, T, H, D), K = q.shape, k.shape[2]
    step, stages = SHAPES[max(D, v.shape[3])]
    with on_device(q):
        _queries_kernel[(ceil_div(T, ROWS * CONSUMERS.value), B * H)](
            tiles_of(q, ROWS), tiles_of(d_out, ROWS), tiles_of(k, step), tiles_of(v, step), d_out, d_lse, out, lse,
            *bounds, *outputs, row_stride(bounds[0]), lse.stride(2), T, H, H // K, scale,
            score_factors(scale, 0.0)[1], stages, d_lse is not None, num_warps=4,
        )  # fmt: skip
    return outputs
