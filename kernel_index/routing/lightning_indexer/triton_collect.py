"""The keys of a row whose scores reach a bound, in Gluon: a warp says which of 32 neighbours do, in one instruction.

Four warps walk over four parts of a row, so none waits for another.  A lane has every 32nd key; its place among those
found is a count of bits, and no sum goes from thread to thread.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernel_index.core.triton.hopper import QuickHopperKernel

NONE = gl.constexpr(-(2**31))

WORDS = 16
"""Keys of a lane at once."""

BALLOT = gl.constexpr("""{
.reg .pred p;
.reg .b32 word;
setp.ne.s32 p, $2, 0;
vote.sync.ballot.b32 word, p, 0xffffffff;
popc.b32 $1, word;
and.b32 word, word, $3;
popc.b32 $0, word;
}""")


@gluon.jit
def _add(a, b):
    return a + b


@QuickHopperKernel
def _collect_kernel(
    ranks_ptr, bounds_ptr, start_ptr, end_ptr, found_ptr, counts_ptr, bound_b, FIRST, QUERIES, ROW, MANY,
    WORDS: gl.constexpr,
):  # fmt: skip
    """Store rank · 2³² + token of the first MANY keys of each part that reach the bound, and count all of them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 1, 32], [4, 1, 1], [2, 1, 0])  # [parts, WORDS, lanes]
    PARTS: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # [parts, lanes]
    local, b = gl.program_id(0), gl.program_id(1).to(gl.int64)
    row = b * QUERIES + local
    bound = gl.load(bounds_ptr + row)
    if bound == NONE:
        return
    start, end = gl.load(start_ptr + b * bound_b + FIRST + local), gl.load(end_ptr + b * bound_b + FIRST + local)
    o_part = gl.arange(0, 4, layout=gl.SliceLayout(1, PARTS))[:, None]
    o_lane = gl.arange(0, 32, layout=gl.SliceLayout(0, PARTS))[None, :]
    o_word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :][:, :, None]
    low = start // 32 * 32
    size = gl.cdiv(gl.cdiv(end - low, 4), WORDS * 32) * (WORDS * 32)
    o_n = (low + o_part * size + o_lane)[:, None, :] + o_word * 32  # [parts, WORDS, lanes]
    below = gl.zeros_like(o_n) + ((1 << o_lane) - 1)[:, None, :]
    p_ranks, p_found = ranks_ptr + row * ROW, found_ptr + row * (4 * MANY) + (o_part * MANY)[:, None, :]
    count = o_part * 0 + o_lane * 0
    rank = gl.load(p_ranks + o_n, mask=(o_n >= start) & (o_n < end), other=NONE)
    for i in range(0, size, WORDS * 32):
        o_next = o_n + WORDS * 32
        m_next = (o_next >= start) & (o_next < end) & (i + WORDS * 32 < size)
        following = gl.load(p_ranks + o_next, mask=m_next, other=NONE)
        m_found = rank >= bound
        place, ones = gl.inline_asm_elementwise(
            BALLOT, "=&r,=&r,r,r", [m_found.to(gl.int32), below], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        slot = count[:, None, :] + gl.associative_scan(ones, 1, _add) - ones + place
        key = (rank.to(gl.int64) << 32) | o_n.to(gl.int64)
        gl.store(p_found + slot, key, mask=m_found & (slot < MANY))
        count += gl.sum(ones, 1)
        o_n, rank = o_next, following
    gl.store(counts_ptr + row * 4 + o_part + o_lane * 0, count, mask=o_lane == 0)


def collect(
    ranks: Tensor, bounds: Tensor, rows: tuple[Tensor, Tensor, int, int], found: Tensor, counts: Tensor
) -> None:
    """Fill ``counts`` int32 [B, T', 4], and as much of ``found`` int64 [B, T', 4 · many] as they say."""
    (B, queries, row), (start, end, bound_b, first) = ranks.shape, rows
    _collect_kernel[(queries, B)](
        ranks, bounds, start, end, found, counts, bound_b, first, queries, row, found.shape[2] // 4, WORDS=WORDS,
        num_warps=4,
    )  # fmt: skip
