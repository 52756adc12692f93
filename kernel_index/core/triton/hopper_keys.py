"""dK and dV of documents on Hopper: see ``hopper_documents.py``."""

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

SHAPES = {64: Shape(128, 2), 128: Shape(64, 2)}
"""Of the wider of both head sizes.  Steps are multiples of 16, so bits do not depend on them."""


@gluon.jit
def _produce_queries(given):
    """The queries of a document for the G heads of a group, one head after the other, with ``lse`` and ``delta``."""
    q_desc, do_desc, k_desc, v_desc, p_lse, p_delta, lse_h, buffers, documents, b, kv_head, G, first, T = given
    k_ring, v_ring, q_ring, do_ring, lse_ring, delta_ring, plan, kv_full, q_full, q_empty = buffers
    STAGES: gl.constexpr = q_ring.shape[0]
    TILES: gl.constexpr = k_ring.shape[0]
    ROWS: gl.constexpr = k_ring.shape[1]
    BM: gl.constexpr = q_ring.shape[1]
    o_i = gl.arange(0, BM, layout=gl.BlockedLayout([1], [32], [1], [0]))
    mbarrier.expect(kv_full.index(0), TILES * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for tile in gl.static_range(TILES):
        copy_tile(k_desc, b, first + tile * ROWS, kv_head, kv_full.index(0), k_ring.index(tile))
        copy_tile(v_desc, b, first + tile * ROWS, kv_head, kv_full.index(0), v_ring.index(tile))
    at = 0
    for document in range(documents):
        o = first_token(plan, document, 1)
        begin, count = segments(plan, document, 1)
        for i in range(count * G):
            slot = at % STAGES
            g = i // count
            first_query = o + (begin + i % count) * BM
            o_number = g * lse_h + first_query + o_i
            lse = gl.load(p_lse + o_number, mask=first_query + o_i < T, other=0.0)
            delta = gl.load(p_delta + o_number, mask=first_query + o_i < T, other=0.0)
            barrier = q_full.index(slot)
            mbarrier.wait(q_empty.index(slot), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            copy_tile(q_desc, b, first_query, kv_head * G + g, barrier, q_ring.index(slot))
            copy_tile(do_desc, b, first_query, kv_head * G + g, barrier, do_ring.index(slot))
            lse_ring.index(slot).store(lse)  # the copy engine takes no rows that begin at any number
            delta_ring.index(slot).store(delta)
            mbarrier.arrive(barrier, count=1)
            at += 1


@gluon.jit
def _consume_queries(given, CONSUMER: gl.constexpr):
    """Scores are transposed, [ROWS, BM]: what is multiplied with d_out and q stays in registers."""
    buffers, documents, start_ptr, end_ptr, p_dk, p_dv, dk_t, dv_t, first, T, G, scale, outer = given
    k_ring, v_ring, q_ring, do_ring, lse_ring, delta_ring, plan, kv_full, q_full, q_empty = buffers
    STAGES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = k_ring.shape[1]
    BM: gl.constexpr = q_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    o_i = CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    zero = gl.full([ROWS, BM], 0.0, gl.float32, layout=S_LAYOUT)
    dk = gl.full([ROWS, D], 0.0, gl.float32, layout=K_LAYOUT)
    dv = gl.full([ROWS, DV], 0.0, gl.float32, layout=V_LAYOUT)
    mbarrier.wait(kv_full.index(0), 0)
    k_tile, v_tile = k_ring.index(CONSUMER), v_ring.index(CONSUMER)
    at = 0
    for document in range(documents):
        begin, count = segments(plan, document, 4)
        sight = sight_of(plan, document, 4)
        for i in range(count * G):
            slot = at % STAGES
            mbarrier.wait(q_full.index(slot), (at // STAGES) & 1)
            s_started = product_nt(k_tile, q_ring.index(slot), zero)
            dp_started = product_nt(v_tile, do_ring.index(slot), zero)
            z = warpgroup_mma_wait(1, [s_started])
            lse = lse_ring.index(slot).load(COLUMN)  # not before: there is no register for it
            p = gl.exp2(gl.fma(z, outer, -lse[None, :]))
            j = begin + i % count
            if is_masked(sight, j):  # dz is 0 with p, or NaN: then it is made again
                p = gl.where(seen(sight, j, o_i, start_ptr + first, end_ptr + first, BM, S_LAYOUT), p, 0.0)
            b_p = gl.convert_layout(p.to(q_ring.dtype), gl.DotOperandLayout(0, V_LAYOUT, k_width=2))
            dv_started = warpgroup_mma(b_p, do_ring.index(slot), dv, is_async=True)
            dp = warpgroup_mma_wait(1, [dp_started])
            delta = delta_ring.index(slot).load(COLUMN)  # nor for this
            dz = p * (dp - delta[None, :])
            b_dz = gl.convert_layout(dz.to(q_ring.dtype), gl.DotOperandLayout(0, K_LAYOUT, k_width=2))
            dk_started = warpgroup_mma(b_dz, q_ring.index(slot), dk, is_async=True)
            dv = warpgroup_mma_wait(1, [dv_started])
            dk = warpgroup_mma_wait(0, [dk_started])
            mbarrier.arrive(q_empty.index(slot), count=1)
            at += 1
    store_tile(p_dk, first + CONSUMER * ROWS, dk_t, dk * scale, T, D)
    store_tile(p_dv, first + CONSUMER * ROWS, dv_t, dv, T, DV)


@QuickHopperKernel
def _keys_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, start_ptr, end_ptr, origin_ptr, dk_ptr, dv_ptr, bounds_b,
    lse_h, T, H, G, scale, outer, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one KV head; ``start`` and ``end`` bound the queries that see each key."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BM: gl.constexpr = q_desc.block_type.shape[1]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    BN: gl.constexpr = CONSUMERS * k_desc.block_type.shape[1]
    buffers = (
        ring(k_desc, CONSUMERS),
        ring(v_desc, CONSUMERS),
        ring(q_desc, STAGES),
        ring(do_desc, STAGES),
        gl.allocate_shared_memory(gl.float32, [STAGES, BM], FLAT),
        gl.allocate_shared_memory(gl.float32, [STAGES, BM], FLAT),
        plan_memory(BN),
        barriers(1, 1),
        barriers(STAGES, 2),
        barriers(STAGES, CONSUMERS),
    )
    fence_async_shared()
    first = gl.program_id(0) * BN
    K = H // G
    b, kv_head = gl.program_id(1) // K, gl.program_id(1) % K
    start_ptr += b * bounds_b
    end_ptr += b * bounds_b
    documents = plan_walk(buffers[6], start_ptr, end_ptr, origin_ptr + b * bounds_b, first, T, BN, BM)
    o_head = b.to(gl.int64) * T * K + kv_head
    consumed = (
        buffers, documents, start_ptr, end_ptr, dk_ptr + o_head * D, dv_ptr + o_head * DV, K * D, K * DV, first, T, G,
        scale, outer,
    )  # fmt: skip
    o_number = (b * H + kv_head * G).to(gl.int64) * lse_h
    produced = (
        q_desc, do_desc, k_desc, v_desc, lse_ptr + o_number, delta_ptr + o_number, lse_h, buffers, documents, b,
        kv_head, G, first, T,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume_queries, (consumed, 0)),
            (_consume_queries, (consumed, 1)),
            (_produce_queries, (produced,)),
        ],
        TWO[0],
        TWO[1],
    )


def backward_keys(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, bounds: tuple[Tensor, ...],
    scale: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``lse`` and ``delta`` lie as those of ``device_documents``; ``bounds``: start, end and origin."""
    (B, T, K, D), H = k.shape, q.shape[2]
    step, stages = SHAPES[max(D, v.shape[3])]
    with on_device(q):
        _keys_kernel[(ceil_div(T, ROWS * CONSUMERS.value), B * K)](
            tiles_of(q, step), tiles_of(d_out, step), tiles_of(k, ROWS), tiles_of(v, ROWS), lse, delta, *bounds,
            *outputs, row_stride(bounds[0]), lse.stride(2), T, H, H // K, scale, score_factors(scale, 0.0)[1], stages,
            num_warps=4,
        )  # fmt: skip
    return outputs
