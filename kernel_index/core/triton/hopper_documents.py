"""Walks over documents on Hopper, in Gluon: what ``hopper_queries.py`` and ``hopper_keys.py`` share.

They make the sums of ``documents_backward.py`` by warps that have roles (``hopper.py``).  A tile holds the rows of two
consumers.  Before the roles begin the program writes a plan: the documents of which the tile has rows, and the segments
from the document's start that those rows visit.  Consumers and producer walk over the plan, so a row's sums are in the
order of ``documents_backward.py``, by the same kind of instruction, whose steps of 16 are counted from the document's
start, too: they have its bits.  A sum that is NaN is made again by the kernels of that module.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernel_index.core.triton.hopper import within

CONSUMERS = gl.constexpr(2)
NUMBERS = gl.constexpr(7)
NOWHERE = gl.constexpr(2**31 - 1)


class Shape(NamedTuple):
    """Rows of the tiles that the producer copies, and slots of its ring."""

    step: int
    stages: int


@gluon.constexpr_function
def _cover(rows):
    """The power of 2 that holds them."""
    return 1 << (rows - 1).bit_length()


@gluon.jit
def _write(plan, at, value):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    plan.index(at).store(gl.full([1], value, gl.int32, layout=ONE))


@gluon.jit
def plan_walk(plan, start_ptr, end_ptr, origin_ptr, first, T, BLOCK: gl.constexpr, STEP: gl.constexpr):
    """How many documents a tile has rows of.  See ``document_of`` and ``segments_of`` of ``documents.py``."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_i = gl.arange(0, _cover(BLOCK), layout=LAYOUT)
    count = gl.minimum(T - first, BLOCK)
    m_row = o_i < count
    start = gl.load(start_ptr + first + o_i, mask=m_row, other=0)
    end = gl.load(end_ptr + first + o_i, mask=m_row, other=0)
    origin = gl.load(origin_ptr + first + o_i, mask=m_row, other=-1)
    documents = 0
    row = 0
    while row < count:
        o = gl.load(origin_ptr + first + row)
        row_stop = gl.minimum(gl.min(gl.where((o_i >= row) & (origin != o), o_i, count), 0), count)
        m_some = (o_i >= row) & (o_i < row_stop) & (start < end)
        high = gl.max(gl.where(m_some, end, o), 0)
        low = gl.minimum(gl.min(gl.where(m_some, start, NOWHERE), 0), high)
        begin, stop = (low - o) // STEP, gl.cdiv(high - o, STEP)
        is_whole = gl.min((m_some | (o_i >= count)).to(gl.int32), 0)
        full = gl.cdiv(gl.max(gl.where(m_some, start, o), 0) - o, STEP)
        tail = (gl.minimum(gl.min(gl.where(m_some, end, NOWHERE), 0), high) - o) // STEP
        full = gl.where(is_whole == 1, gl.minimum(gl.maximum(full, begin), stop), stop)
        tail = gl.maximum(gl.minimum(tail, stop), full)
        _write(plan, documents * NUMBERS, o)
        _write(plan, documents * NUMBERS + 1, row)
        _write(plan, documents * NUMBERS + 2, row_stop)
        _write(plan, documents * NUMBERS + 3, begin)
        _write(plan, documents * NUMBERS + 4, full)
        _write(plan, documents * NUMBERS + 5, tail)
        _write(plan, documents * NUMBERS + 6, stop)
        documents += 1
        row = row_stop
    return documents


@gluon.jit
def _read(plan, at, WARPS: gl.constexpr):
    return gl.sum(plan.index(at).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def first_token(plan, document, WARPS: gl.constexpr):
    return _read(plan, document * NUMBERS, WARPS)


@gluon.jit
def segments(plan, document, WARPS: gl.constexpr):
    """The first segment of a document that rows of the tile visit, and how many they visit."""
    begin = _read(plan, document * NUMBERS + 3, WARPS)
    return begin, _read(plan, document * NUMBERS + 6, WARPS) - begin


@gluon.jit
def sight_of(plan, document, WARPS: gl.constexpr):
    """A document's first token, its rows of the tile, and the segments between which every one of them sees all."""
    at = document * NUMBERS
    o, row, row_stop = _read(plan, at, WARPS), _read(plan, at + 1, WARPS), _read(plan, at + 2, WARPS)
    return o, row, row_stop, _read(plan, at + 4, WARPS), _read(plan, at + 5, WARPS)


@gluon.jit
def is_masked(sight, j):
    """Whether a row may not see all of the j-th segment."""
    _o, _row, _row_stop, full, tail = sight
    return (j < full) | (j >= tail)


@gluon.jit
def seen(sight, j, o_i, p_start, p_end, STEP: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Whether rows ``o_i`` of the tile see the tokens of the j-th segment: bool [ROWS, STEP].

    The bounds are loaded here, since most segments need none, and a register is worth more.
    """
    o, row, row_stop, _full, _tail = sight
    m_doc = within(o_i, row, row_stop)
    start = gl.load(p_start + o_i, mask=m_doc, other=0)
    end = gl.load(p_end + o_i, mask=m_doc, other=0)
    o_t = o + j * STEP + gl.arange(0, STEP, layout=gl.SliceLayout(0, S_LAYOUT))
    return within(o_t[None, :], start[:, None], end[:, None])


@gluon.jit
def plan_memory(ROWS: gl.constexpr):
    """For the plan of a tile, each row of which may be of another document."""
    return gl.allocate_shared_memory(gl.int32, [NUMBERS * ROWS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
