"""Attention by documents on Hopper, its forward pass: see ``hopper_documents.py``.

The segments are those of ``documents.py``, and so is what happens in each.
"""

from typing import NamedTuple

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
    ROWS,
    THREE,
    TWO,
    QuickHopperKernel,
    barriers,
    copy_tile,
    has_tiles,
    product_nt,
    ring,
    store_tile,
    tiles_of,
)
from kernel_index.core.triton.hopper_documents import (
    first_token,
    is_masked,
    plan_memory,
    plan_walk,
    seen,
    segments,
    sight_of,
)
from kernel_index.core.triton.launch import ceil_div, on_device, row_stride, score_factors


class Shape(NamedTuple):
    """How many consumers a program has, and slots its ring."""

    consumers: int
    stages: int


SHAPES = {64: Shape(3, 4), 128: Shape(2, 3)}
"""Of the wider of both head sizes."""


@gluon.jit
def _produce(given):
    q_desc, k_desc, v_desc, buffers, documents, b, h, kv_head, first = given
    q_ring, k_ring, v_ring, plan, q_full, k_full, k_empty, v_full, v_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    TILES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BN: gl.constexpr = k_ring.shape[1]
    mbarrier.expect(q_full.index(0), TILES * q_desc.block_type.nbytes)
    for tile in gl.static_range(TILES):
        copy_tile(q_desc, b, first + tile * ROWS, h, q_full.index(0), q_ring.index(tile))
    at = 0
    for document in range(documents):
        o = first_token(plan, document, 1)
        begin, count = segments(plan, document, 1)
        for i in range(count):
            slot = at % STAGES
            phase = ((at // STAGES) & 1) ^ 1
            first_key = o + (begin + i) * BN
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            copy_tile(k_desc, b, first_key, kv_head, k_full.index(slot), k_ring.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            copy_tile(v_desc, b, first_key, kv_head, v_full.index(slot), v_ring.index(slot))
            at += 1


@gluon.jit
def _online_softmax(s, row_max, row_sum, sight, j, bounds, outer, BN: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Of the j-th segment: see ``_forward_step`` of ``documents.py``."""
    if is_masked(sight, j):
        o_i, p_start, p_end = bounds
        s = gl.where(seen(sight, j, o_i, p_start, p_end, BN, S_LAYOUT), s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * outer)
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(gl.fma(s, outer, -shift[:, None]))
    alpha = gl.exp2(row_max - shift)
    return p, alpha, new_max, gl.fma(row_sum, alpha, gl.sum(p, 1))


@gluon.jit
def _consume(given, CONSUMER: gl.constexpr):
    buffers, documents, start_ptr, end_ptr, p_out, p_lse, out_t, first, T, outer = given
    q_ring, k_ring, v_ring, plan, q_full, k_full, k_empty, v_full, v_empty = buffers
    STAGES: gl.constexpr = k_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    BN: gl.constexpr = k_ring.shape[1]
    DV: gl.constexpr = v_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    o_i = CONSUMER * ROWS + gl.arange(0, ROWS, layout=ROW)
    bounds = (o_i, start_ptr + first, end_ptr + first)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    row_sum = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
    zero = gl.full([ROWS, BN], 0.0, gl.float32, layout=S_LAYOUT)
    acc = gl.full([ROWS, DV], 0.0, gl.float32, layout=O_LAYOUT)
    mbarrier.wait(q_full.index(0), 0)  # also without keys: a program that ends gives its shared memory to the next
    q_tile = q_ring.index(CONSUMER)
    at = 0
    for document in range(documents):
        begin, count = segments(plan, document, 4)
        sight = sight_of(plan, document, 4)
        if count > 0:
            slot = at % STAGES
            mbarrier.wait(k_full.index(slot), (at // STAGES) & 1)
            s_started = product_nt(q_tile, k_ring.index(slot), zero)
            s = warpgroup_mma_wait(0, [s_started])
            mbarrier.arrive(k_empty.index(slot), count=1)
            p, alpha, row_max, row_sum = _online_softmax(s, row_max, row_sum, sight, begin, bounds, outer, BN, S_LAYOUT)
            acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
            b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
            for i in range(1, count):
                after = (at + i) % STAGES
                mbarrier.wait(k_full.index(after), ((at + i) // STAGES) & 1)
                s_started = product_nt(q_tile, k_ring.index(after), zero)
                mbarrier.wait(v_full.index(slot), ((at + i - 1) // STAGES) & 1)
                acc_started = warpgroup_mma(b_p, v_ring.index(slot), acc, is_async=True)
                s = warpgroup_mma_wait(1, [s_started])
                mbarrier.arrive(k_empty.index(after), count=1)
                p, alpha, row_max, row_sum = _online_softmax(
                    s, row_max, row_sum, sight, begin + i, bounds, outer, BN, S_LAYOUT
                )
                acc = warpgroup_mma_wait(0, [acc_started])
                mbarrier.arrive(v_empty.index(slot), count=1)
                acc = acc * gl.convert_layout(alpha, OUT_ROW)[:, None]
                b_p = gl.convert_layout(p.to(v_ring.dtype), P_LAYOUT)
                slot = after
            mbarrier.wait(v_full.index(slot), ((at + count - 1) // STAGES) & 1)
            acc_started = warpgroup_mma(b_p, v_ring.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc_started])
            mbarrier.arrive(v_empty.index(slot), count=1)
            at += count
    o_q = first + o_i
    m_empty = gl.load(start_ptr + o_q, mask=o_q < T, other=0) >= gl.load(end_ptr + o_q, mask=o_q < T, other=0)
    row_sum = gl.where(m_empty, 1.0, row_sum)
    lse = gl.where(m_empty, float("-inf"), row_max + gl.log2(row_sum))
    gl.store(p_lse + o_q, lse, mask=o_q < T)
    out = acc / gl.convert_layout(row_sum, OUT_ROW)[:, None]
    store_tile(p_out, first + CONSUMER * ROWS, out_t, out, T, DV)


@QuickHopperKernel
def _outputs_kernel(
    q_desc, k_desc, v_desc, start_ptr, end_ptr, origin_ptr, out_ptr, lse_ptr, bounds_b, lse_h, T, H, G, outer,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of queries of one head."""
    BN: gl.constexpr = k_desc.block_type.shape[1]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    BM: gl.constexpr = CONSUMERS * q_desc.block_type.shape[1]
    buffers = (
        ring(q_desc, CONSUMERS),
        ring(k_desc, STAGES),
        ring(v_desc, STAGES),
        plan_memory(BM),
        barriers(1, 1),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
    )
    fence_async_shared()
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * BM  # the long rows of a causal mask begin first
    b, h = gl.program_id(1) // H, gl.program_id(1) % H
    start_ptr += b * bounds_b
    end_ptr += b * bounds_b
    documents = plan_walk(buffers[3], start_ptr, end_ptr, origin_ptr + b * bounds_b, first, T, BM, BN)
    consumed = (
        buffers, documents, start_ptr, end_ptr, out_ptr + (b.to(gl.int64) * T * H + h) * DV,
        lse_ptr + (b * H + h).to(gl.int64) * lse_h, H * DV, first, T, outer,
    )  # fmt: skip
    produced = (q_desc, k_desc, v_desc, buffers, documents, b, h, h // G, first)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (consumed, 0)),
                (_consume, (consumed, 1)),
                (_produce, (produced,)),
            ],
            TWO[0],
            TWO[1],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consumed, 0)),
                (_consume, (consumed, 1)),
                (_consume, (consumed, 2)),
                (_produce, (produced,)),
            ],
            THREE[0],
            THREE[1],
        )


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, ...], step: int, scale: float,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``outputs``: out, dense, and ``lse`` of ``device_documents``; ``step``: keys of a segment."""
    k, v = (x if has_tiles(x) else x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    (B, T, H, D), K = q.shape, k.shape[2]
    consumers, stages = SHAPES[max(D, v.shape[3])]
    with on_device(q):
        _outputs_kernel[(ceil_div(T, ROWS * consumers), B * H)](
            tiles_of(q, ROWS), tiles_of(k, step), tiles_of(v, step), *bounds, *outputs, row_stride(bounds[0]),
            outputs[1].stride(2), T, H, H // K, score_factors(scale, 0.0)[1], consumers, stages,
            num_warps=4,
        )  # fmt: skip
    return outputs
