"""Parts of lists on Hopper: a warp draws them from a counter, copies their keys and values, and tells the other warps.

What it tells are ``NUMBERS`` integers in shared memory.  See ``triton_hopper_lists.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernel_index.core.triton.hopper import barriers, copy_tile, ring

PLANS = gl.constexpr(2)
"""Parts of lists that a program knows at once: the one in work and the next."""

NUMBERS = gl.constexpr(7)
"""Of a plan: segment in the launch, block, first entry, end, which part of the segment it is, what of the block is not
finite, 1 keys, 2 values; and up to which tile there are rows that may not see all keys."""

GATHERERS = gl.constexpr(128)
"""Threads that gather queries."""


INFO = gl.constexpr(4)
"""Of a block of a union: its number, the queries of the first and of the second consumer that selected it as bits, and
what of it is not finite: 1 keys, 2 values.  Those of CHUNK blocks are loaded and noted at once."""

CHUNK = gl.constexpr(32)

CHUNKS = gl.constexpr(3)
"""That are noted at a time: when one is written anew, the consumers have come to one of the two behind it."""


@gluon.jit
def kv_slots(k_desc, v_desc, CONSUMERS: gl.constexpr):
    """Rings for keys, values and numbers of parts, and their barriers; gatherers read the numbers, too."""
    return (
        ring(k_desc, PLANS),
        ring(v_desc, PLANS),
        gl.allocate_shared_memory(gl.int32, [PLANS * NUMBERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        barriers(PLANS, 1),
        barriers(PLANS, CONSUMERS + 1),
        barriers(PLANS, 1),
        barriers(PLANS, CONSUMERS),
    )


@gluon.jit
def read_number(plan, i, LAYOUT: gl.constexpr):
    return gl.sum(plan.index(i).load(LAYOUT), 0)


@gluon.jit
def noted(info, chunk, which: gl.constexpr, i, LAYOUT: gl.constexpr):
    """A number of the i-th block of a chunk."""
    ONES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    notes = info.index(chunk % CHUNKS * INFO + which)._reinterpret(gl.int32, [CHUNK, 1], ONES)
    return read_number(notes, i % CHUNK, LAYOUT)


@gluon.jit
def entries(order_ptr, first, stop, o_m, HEADS: gl.constexpr):
    """The entry of each row of the tile of entries from ``first`` on, −1 behind ``stop``.

    Four warps gather rows, and what bounds them is how many instructions each row takes one after the other.
    """
    return gl.load(order_ptr + first + o_m // HEADS, mask=o_m // HEADS < stop - first, other=-1)


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
def schedule(given, ENTRIES: gl.constexpr, SHIFT: gl.constexpr, TOGETHER: gl.constexpr):
    """Draws parts of lists, copies their keys and values, and tells the others; −1 for the segment is the end.

    TOGETHER: all segments side by side, else one after the other, so that the cache holds the rows of one.
    """
    (
        k_desc, v_desc, kv, items_ptr, parts_ptr, bad_ptr, counter_ptr, first_segment, SEGMENTS, M, BLOCKS, CHUNKS, G,
        GROUPS, order_ptr, start_ptr, end_ptr, window_b,
    ) = given  # fmt: skip
    k_ring, v_ring, plan, plan_full, plan_empty, kv_full, kv_empty = kv
    BLOCK: gl.constexpr = k_ring.shape[1]
    most = _most_parts(parts_ptr, first_segment, SEGMENTS, BLOCKS)
    total = most * SEGMENTS
    number = gl.program_id(0)
    turn = 0
    while number < total:
        after = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if TOGETHER:
            part, segment = number // SEGMENTS, number % SEGMENTS
        else:
            segment, part = number // most, number % most
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
