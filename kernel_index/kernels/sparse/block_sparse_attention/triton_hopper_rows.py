"""Rows on Hopper: one head of one query.  Tiles of them that lie together come by TMA, for unions; those of the entries
of lists are gathered, awaited and masked here, for ``triton_hopper_backward.py``.

The bounds of what queries see never decrease.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernel_index.core.triton.hopper import DTYPES, barriers
from kernel_index.kernels.sparse.block_sparse_attention.triton_hopper_parts import (
    GATHERERS,
    NUMBERS,
    PLANS,
    entries,
    read_number,
)

CONSUMERS = gl.constexpr(2)
"""Of a program that goes by unions."""


def rows_of(x: Tensor, queries: int, heads: int) -> TensorDescriptor:
    """Tiles of ``queries`` tokens × ``heads`` heads of x [B, T, H, D]; behind the last token are zeros."""
    block = [1, queries, heads, x.shape[3]]
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape, x.stride(), strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], block, layout)


@gluon.jit
def row_ring(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of rows, each [64, columns]."""
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, COLUMNS], desc.dtype)
    return gl.allocate_shared_memory(desc.dtype, [COUNT, 64, COLUMNS], LAYOUT)


@gluon.jit
def row_place(number, TILES, G, GROUP, QUERIES, HEADS: gl.constexpr, CONSUMER: gl.constexpr, LAYOUT: gl.constexpr):
    """Batch row, group, the first query of a consumer, and of its rows [64] the query and the head."""
    group, tile = number // TILES, TILES - 1 - number % TILES
    b, g = group // G, group % G
    first = (tile * CONSUMERS + CONSUMER) * QUERIES
    o_m = gl.arange(0, 64, layout=LAYOUT)
    return b, g, first, first + o_m // HEADS, g * GROUP + o_m % HEADS


@gluon.jit
def inner_bounds(p_start, p_end, first, T, QUERIES):
    """From where on and up to where all queries of a consumer see keys: bounds never decrease."""
    last = gl.maximum(gl.minimum(first + QUERIES, T) - 1, 0)
    return gl.load(p_start + last), gl.load(p_end + gl.minimum(first, T - 1))


@gluon.jit
def store_rows(p_out, value, b, o_q, o_h, T, H, LAYOUT: gl.constexpr):
    """64 rows of a dense tensor [B, T, H, columns], in stores of 16 bytes."""
    COLUMNS: gl.constexpr = value.shape[1]
    value = gl.convert_layout(value.to(p_out.dtype.element_ty), LAYOUT)
    o_column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    o_row = (b.to(gl.int64) * T + o_q) * H + o_h
    gl.store(p_out + o_row[:, None] * COLUMNS + o_column[None, :], value, mask=(o_q < T)[:, None])


@gluon.jit
def row_slots(STAGES: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, DTYPE: gl.constexpr,
              READERS: gl.constexpr):  # fmt: skip
    """A ring of tiles of rows: q and the gradient of the output, log-sum-exp, ``delta``, and the bounds of the keys
    that the row's query sees; barriers for the gatherers and for READERS."""
    Q_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    DO_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DV], DTYPE)
    FLAT_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return (
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], Q_SHARED),
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, DV], DO_SHARED),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT_SHARED),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT_SHARED),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], FLAT_SHARED),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], FLAT_SHARED),
        barriers(STAGES, GATHERERS),
        barriers(STAGES, READERS),
    )


@gluon.jit
def gather_rows(given, HEADS: gl.constexpr, SHIFT: gl.constexpr):
    (
        kv, rows, q_ptr, do_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, end_ptr, q_b, q_t, q_h, do_b, do_t, do_h,
        window_b, first_segment, CHUNKS, T, G, GROUP,
    ) = given  # fmt: skip
    _k_ring, _v_ring, plan, plan_full, plan_empty, _kv_full, _kv_empty = kv
    q_ring, do_ring, lse_ring, delta_ring, start_ring, end_ring, full, empty = rows
    STAGES: gl.constexpr = q_ring.shape[0]
    ROWS: gl.constexpr = q_ring.shape[1]
    D: gl.constexpr = q_ring.shape[2]
    DV: gl.constexpr = do_ring.shape[2]
    ENTRIES: gl.constexpr = ROWS // HEADS
    Q_WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    DO_WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_q = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_WIDE))
    o_do = gl.arange(0, ROWS, layout=gl.SliceLayout(1, DO_WIDE))
    o_flat = gl.arange(0, ROWS, layout=FLAT)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, Q_WIDE))
    o_dv = gl.arange(0, DV, layout=gl.SliceLayout(0, DO_WIDE))
    turn = 0
    tile = 0
    mbarrier.wait(plan_full.index(0), 0)
    segment = read_number(plan, 0, FLAT)
    while segment >= 0:
        at = turn % PLANS
        start, stop = read_number(plan, at * NUMBERS + 2, FLAT), read_number(plan, at * NUMBERS + 3, FLAT)
        masked = read_number(plan, at * NUMBERS + 6, FLAT)
        mbarrier.arrive(plan_empty.index(at), count=1)
        group = (first_segment + segment) // CHUNKS
        b, first_head = (group // G).to(gl.int64), group % G * GROUP
        p_q = q_ptr + b * q_b + first_head.to(gl.int64) * q_h
        p_do = do_ptr + b * do_b + first_head.to(gl.int64) * do_h
        p_q_rows = p_q + (o_q % HEADS * q_h)[:, None] + o_d[None, :]
        p_do_rows = p_do + (o_do % HEADS * do_h)[:, None] + o_dv[None, :]
        H = G * GROUP
        o_first = b * T * H + first_head
        p_lse, p_delta = lse_ptr + o_first + o_flat % HEADS, delta_ptr + o_first + o_flat % HEADS
        p_start, p_end = start_ptr + group // G * window_b, end_ptr + group // G * window_b
        b_q = entries(order_ptr, start, stop, o_q, HEADS)
        b_flat = entries(order_ptr, start, stop, o_flat, HEADS)
        count = gl.cdiv(stop - start, ENTRIES)
        for i in range(count):
            next_q = entries(order_ptr, start + (i + 1) * ENTRIES, stop, o_q, HEADS)
            next_flat = entries(order_ptr, start + (i + 1) * ENTRIES, stop, o_flat, HEADS)
            slot = (tile + i) % STAGES
            m_q, m_flat = b_q >= 0, b_flat >= 0
            token, token_flat = gl.maximum(b_q, 0) >> SHIFT, gl.maximum(b_flat, 0) >> SHIFT
            m_do = gl.convert_layout(m_q, gl.SliceLayout(1, DO_WIDE))
            token_do = gl.convert_layout(token, gl.SliceLayout(1, DO_WIDE))
            mbarrier.wait(empty.index(slot), (((tile + i) // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(
                q_ring.index(slot), p_q_rows + (token.to(gl.int64) * q_t)[:, None], mask=m_q[:, None]
            )
            async_copy.async_copy_global_to_shared(
                do_ring.index(slot), p_do_rows + (token_do.to(gl.int64) * do_t)[:, None], mask=m_do[:, None]
            )
            o_row = token_flat.to(gl.int64) * H
            async_copy.async_copy_global_to_shared(lse_ring.index(slot), p_lse + o_row, mask=m_flat)
            async_copy.async_copy_global_to_shared(delta_ring.index(slot), p_delta + o_row, mask=m_flat)
            if i < masked:
                async_copy.async_copy_global_to_shared(start_ring.index(slot), p_start + token_flat, mask=m_flat)
                async_copy.async_copy_global_to_shared(end_ring.index(slot), p_end + token_flat, mask=m_flat)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            b_q = next_q
            b_flat = next_flat
        tile += count
        turn += 1
        at = turn % PLANS
        mbarrier.wait(plan_full.index(at), (turn // PLANS) & 1)
        segment = read_number(plan, at * NUMBERS, FLAT)


@gluon.jit
def unseen(rows, slot, BN: gl.constexpr, first_key, S_LAYOUT: gl.constexpr):
    """Which of the rows of a slot [BN, ROWS] do not see the key; what is no entry sees none."""
    _q_ring, _do_ring, _lse_ring, _delta_ring, start_ring, end_ring, _full, _empty = rows
    start = start_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
    end = end_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
    o_k = first_key + gl.arange(0, BN, layout=gl.SliceLayout(1, S_LAYOUT))
    return (o_k[:, None] < start[None, :]) | (o_k[:, None] >= end[None, :])


@gluon.jit
def _clean_rows(tile, lse_tile, delta_tile, LAYOUT: gl.constexpr):
    """Sets to 0 the rows of a tile whose log-sum-exp or ``delta`` is not finite: so it is where a value of them is not.

    Their weights become NaN.  Two roles do so, and write the same.
    """
    flag = (lse_tile.load(gl.SliceLayout(1, LAYOUT)) + delta_tile.load(gl.SliceLayout(1, LAYOUT))) * 0.0
    if gl.max((flag != 0.0).to(gl.int32), 0) == 1:
        tile.store(gl.where((flag == 0.0)[:, None], tile.load(LAYOUT), 0.0).to(tile.dtype))


@gluon.jit
def await_rows(rows, tile, masked, Q_WIDE: gl.constexpr, DO_WIDE: gl.constexpr):
    """Until the rows of a tile are there; clean ones, where some may not be seen."""
    q_ring, do_ring, lse_ring, delta_ring, _start_ring, _end_ring, full, _empty = rows
    STAGES: gl.constexpr = q_ring.shape[0]
    slot = tile % STAGES
    mbarrier.wait(full.index(slot), (tile // STAGES) & 1)
    if masked:
        _clean_rows(q_ring.index(slot), lse_ring.index(slot), delta_ring.index(slot), Q_WIDE)
        _clean_rows(do_ring.index(slot), lse_ring.index(slot), delta_ring.index(slot), DO_WIDE)
    fence_async_shared()
    return slot


@gluon.jit
def offsets(N: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Of a dense matrix [N, D]."""
    o_n, o_d = gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT)), gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    return o_n[:, None] * D + o_d[None, :]


@gluon.constexpr_function
def wide(D):
    """Of rows of D columns: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
