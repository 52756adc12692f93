"""Products of many rows on Hopper, in Gluon: the sums of ``products.py`` by tiles that the copy engine brings.

A program walks over tiles of the result.  Two consumers have 64 rows of it each, and a producer, one warp, keeps a ring
of STAGES pairs of operand tiles full.  An element is one accumulator over the summed dimension in rising order, by the
instruction that ``products.py`` has, so it has the same bits.  A finished tile leaves by the copy engine, too, while
the next one is multiplied.

A weight's gradient has few elements, each a sum over all tokens.  It is summed in parts of the tokens, whose float32
sums a second kernel adds up in order.  How many parts there are, the sizes decide: ``parts_of`` weighs programs that
have nothing to do against the traffic of the parts.
"""

import functools
from typing import Any

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernel_index.core.triton.hopper import DTYPES, ROWS, TWO, QuickHopperKernel, barriers
from kernel_index.core.triton.jit import MOST_KNOWN, Place, place_of
from kernel_index.core.triton.launch import ceil_div, on_device, processors
from kernel_index.core.triton.sums import sum_in_order

DEPTH, GROUP = 64, 8
TILE_ROWS = 2 * ROWS


def _columns_and_stages(y: Tensor) -> tuple[int, int]:
    """What shared memory holds: a tile of the result is in it, too."""
    if y.dtype == torch.float32:
        return 128, 4
    return (256, 3) if y.shape[1] > 128 else (128, 5)


@gluon.jit
def _place(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    """See ``products.py``."""
    in_group = GROUP * column_tiles
    first = tile // in_group * GROUP
    rows = gl.minimum(row_tiles - first, GROUP)
    return first + tile % in_group % rows, tile % in_group // rows


@gluon.jit
def _produce(given, A_TURNED: gl.constexpr, B_TURNED: gl.constexpr, GROUP: gl.constexpr):
    a_desc, b_desc, buffers, row_tiles, column_tiles, steps, parts = given
    a_ring, b_ring, _, full, empty = buffers
    STAGES: gl.constexpr = b_ring.shape[0]
    A_ROWS: gl.constexpr = a_ring.shape[2] if A_TURNED else a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[1] if A_TURNED else a_ring.shape[2]
    COLUMNS: gl.constexpr = b_ring.shape[2] if B_TURNED else b_ring.shape[1]
    at = 0
    per = gl.cdiv(steps, parts)
    for number in range(gl.program_id(0), row_tiles * column_tiles * parts, gl.num_programs(0)):
        part, tile = number // (row_tiles * column_tiles), number % (row_tiles * column_tiles)
        row, column = _place(tile, row_tiles, column_tiles, GROUP)
        for i in range(part * per, gl.minimum((part + 1) * per, steps)):
            slot = at % STAGES
            mbarrier.wait(empty.index(slot), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            for half in gl.static_range(2):
                first = (2 * row + half) * A_ROWS
                target = a_ring.index(2 * slot + half)
                if A_TURNED:
                    tma.async_copy_global_to_shared(a_desc, [i * DEPTH, first], full.index(slot), target)
                else:
                    tma.async_copy_global_to_shared(a_desc, [first, i * DEPTH], full.index(slot), target)
            b_tile = b_ring.index(slot)
            if B_TURNED:
                tma.async_copy_global_to_shared(b_desc, [i * DEPTH, column * COLUMNS], full.index(slot), b_tile)
            else:
                tma.async_copy_global_to_shared(b_desc, [column * COLUMNS, i * DEPTH], full.index(slot), b_tile)
            at += 1


@gluon.jit
def _consume(
    given, CONSUMER: gl.constexpr, A_TURNED: gl.constexpr, B_TURNED: gl.constexpr, HAS_BIAS: gl.constexpr,
    ADD: gl.constexpr, PARTIAL: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    y_desc, y_ptr, bias_ptr, buffers, M, N, row_tiles, column_tiles, steps, parts = given
    a_ring, b_ring, y_ring, full, empty = buffers
    STAGES: gl.constexpr = b_ring.shape[0]
    ROWS: gl.constexpr = a_ring.shape[2] if A_TURNED else a_ring.shape[1]
    COLUMNS: gl.constexpr = b_ring.shape[2] if B_TURNED else b_ring.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    at = 0
    per = gl.cdiv(steps, parts)
    for number in range(gl.program_id(0), row_tiles * column_tiles * parts, gl.num_programs(0)):
        part, tile = number // (row_tiles * column_tiles), number % (row_tiles * column_tiles)
        row, column = _place(tile, row_tiles, column_tiles, GROUP)
        begin, stop = part * per, gl.minimum((part + 1) * per, steps)
        o_m = (2 * row + CONSUMER) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        o_n = column * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
        p_y = y_ptr + (part.to(gl.int64) * M + o_m)[:, None] * N + o_n[None, :]
        acc = gl.full([ROWS, COLUMNS], 0.0, gl.float32, layout=LAYOUT)
        if ADD:
            tma.store_wait(0)
            acc = gl.load(p_y, mask=m_y, other=0.0)
        for i in range(begin, stop):
            slot = at % STAGES
            mbarrier.wait(full.index(slot), (at // STAGES) & 1)
            a, b = a_ring.index(2 * slot + CONSUMER), b_ring.index(slot)
            if A_TURNED:
                a = a.permute([1, 0])
            if not B_TURNED:
                b = b.permute([1, 0])
            started = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, [started])
            if i > begin:  # the product before this one has read its tiles
                mbarrier.arrive(empty.index((at - 1) % STAGES), count=1)
            at += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index((at - 1) % STAGES), count=1)
        if HAS_BIAS:
            acc += gl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(gl.float32)[None, :]
        if PARTIAL:  # its tile would take the place of a stage
            gl.store(p_y, acc, mask=m_y)
        else:
            y_tile = y_ring.index(CONSUMER)
            tma.store_wait(0)
            y_tile.store(acc.to(y_ring.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y_desc, [(2 * row + CONSUMER) * ROWS, column * COLUMNS], y_tile)
    if not PARTIAL:
        tma.store_wait(0)


@gluon.jit
def _tiles(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of a descriptor."""
    ROWS: gl.constexpr = desc.block_type.shape[0]
    COLUMNS: gl.constexpr = desc.block_type.shape[1]
    return gl.allocate_shared_memory(desc.dtype, [COUNT, ROWS, COLUMNS], desc.layout)


@QuickHopperKernel
def _product_kernel(
    a_desc, b_desc, y_desc, y_ptr, bias_ptr, M, N, row_tiles, column_tiles, steps, parts,
    STAGES: gl.constexpr, A_TURNED: gl.constexpr, B_TURNED: gl.constexpr, HAS_BIAS: gl.constexpr, ADD: gl.constexpr,
    PARTIAL: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """y [M, N] = a·b + bias, or y += with ``ADD``; with ``PARTIAL`` [parts, M, N], the sums of each part.

    a is [M, K] as it lies, or [K, M] with ``A_TURNED``; b is [N, K], or [K, N].
    """
    a_ring, b_ring = _tiles(a_desc, 2 * STAGES), _tiles(b_desc, STAGES)
    if PARTIAL:
        y_ring = a_ring  # not used
    else:
        y_ring = _tiles(y_desc, 2)
    buffers = (a_ring, b_ring, y_ring, barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    consumed = (y_desc, y_ptr, bias_ptr, buffers, M, N, row_tiles, column_tiles, steps, parts)
    gl.warp_specialize(
        [
            (_consume, (consumed, 0, A_TURNED, B_TURNED, HAS_BIAS, ADD, PARTIAL, GROUP)),
            (_consume, (consumed, 1, A_TURNED, B_TURNED, HAS_BIAS, ADD, PARTIAL, GROUP)),
            (_produce, ((a_desc, b_desc, buffers, row_tiles, column_tiles, steps, parts), A_TURNED, B_TURNED, GROUP)),
        ],
        TWO[0],
        TWO[1],
    )


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[dtype])


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(*block, x.dtype))


def operands_why_not(a: Tensor, b: Tensor, *results: Tensor) -> str | None:
    """Operands that the copy engine takes as they lie, or lie turned; and results that it writes."""
    if a.dtype not in (torch.bfloat16, torch.float16) or any(y.dtype not in (a.dtype, torch.float32) for y in results):
        return "takes float16 and bfloat16"
    for x in (a if a.stride(1) == 1 else a.T, b.T if b.stride(0) == 1 else b, *results):
        if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
            return "needs rows that begin at multiples of 16 bytes"
    return "has nothing to add up" if a.shape[1] == 0 else None


def why_not(a: Tensor, b: Tensor, y: Tensor) -> str | None:
    """And tiles enough for the processors."""
    if (rule := operands_why_not(a, b, y)) is not None:
        return rule
    tiles = ceil_div(y.shape[0], TILE_ROWS) * ceil_div(y.shape[1], _columns_and_stages(y)[0])
    return "has too few tiles for the processors" if 2 * tiles < processors(y) else None


def multiply(a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor, *, add: bool = False) -> Tensor:
    """``y`` [M, N], contiguous, becomes a [M, K] · b [K, N] + bias [N]; ``why_not`` must have nothing against it.

    With ``add`` the product is added to y, which is float32.
    """
    _Launch(a, b, bias, y, 1, add)(None, a, b, bias, y)
    return y


def multiplied(a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor, *, few: bool, add: bool, in_parts: bool) -> bool:
    """Whether ``y`` became the product here.  With ``few`` rows it does by a sum in parts alone."""
    place, bits = place_of(a), a.data_ptr() | b.data_ptr() | y.data_ptr() | (0 if bias is None else bias.data_ptr())
    if place is None or place[0] != a.get_device() or bits % 16:
        place, launch = None, _launch_of(a, b, bias, y, few, add, in_parts)
    else:
        dtypes = a.dtype, b.dtype, y.dtype, None if bias is None else bias.dtype
        key = (place[0], a.shape, a.stride(), b.shape, b.stride(), dtypes, few, add, in_parts)
        if key not in _KNOWN:
            if len(_KNOWN) >= MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = _launch_of(a, b, bias, y, few, add, in_parts)
        launch = _KNOWN[key]
    if launch is None:
        return False
    if launch.parts == 1:
        launch(place, a, b, bias, y)
    else:
        _sum_parts_of(launch, place, a, b, y)
    return True


_KNOWN: "dict[Any, _Launch | None]" = {}
"""By sizes, strides and dtypes, for addresses that the copy engine takes: the host is the limit of small layers."""


def _launch_of(
    a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor, few: bool, add: bool, in_parts: bool
) -> "_Launch | None":
    parts = parts_of(a, b) if in_parts else 1
    if parts > 1 and operands_why_not(a, b) is None:
        return _Launch(a, b, None, y, parts, False)
    return None if few or why_not(a, b, y) is not None else _Launch(a, b, bias, y, 1, add)


PROGRAMS = 132
"""Of a launch at most.  Not the processors that a GPU has, since the number of parts decides bits."""

MOST = 64
"""Parts."""

EDGE, SECOND, TRAFFIC = 4, 5, 2.3e-6
"""In the time of one step of a 128 × 256 tile, 0.7 µs: to begin and end a tile; to launch the second kernel; and to
write and read an element of a part, at 5 TB/s."""


def _part_columns(N: int) -> int:
    return 256 if N > 128 else 128


def parts_of(a: Tensor, b: Tensor) -> int:
    """How many parts the sum of a weight's gradient is divided into."""
    return _parts_of(*a.shape, b.shape[1])


@functools.cache
def _parts_of(M: int, K: int, N: int) -> int:
    columns, steps = _part_columns(N), ceil_div(K, DEPTH)
    if steps == 0:  # no tokens: nothing to add up
        return 1
    tiles = ceil_div(M, TILE_ROWS) * ceil_div(N, columns)

    def cost(parts: int) -> float:
        rounds = ceil_div(tiles * parts, PROGRAMS) * (ceil_div(steps, parts) + EDGE) * columns / 256
        return rounds + (SECOND + parts * M * N * TRAFFIC if parts > 1 else 0)

    wanted = min(range(1, min(MOST, steps) + 1), key=cost)
    return ceil_div(steps, ceil_div(steps, wanted))  # none of them is empty


def multiply_in_parts(a: Tensor, b: Tensor, y: Tensor, parts: int) -> Tensor:
    """``y`` [M, N] becomes a [M, K] · b [K, N], summed in parts of K that are added up in order."""
    return _sum_parts_of(_Launch(a, b, None, y, parts, False), None, a, b, y)


def _sum_parts_of(launch: "_Launch", place: Place | None, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    sums = y.new_empty(launch.parts, *y.shape, dtype=torch.float32)
    launch(place, a, b, None, sums)
    sum_in_order(sums.view(launch.parts, -1), y.view(-1))
    return y


class _Tiles:
    """What a launch reads of a descriptor.  Triton's own checks all of it again, which an earlier launch did."""

    __slots__ = ("base", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, base: Tensor, shape: list[int], strides: list[int]):
        self.base, self.shape, self.strides = base, shape, strides


class _Launch:
    """The launch for operands of these sizes, strides and dtypes; a result in ``parts`` is [parts, M, N]."""

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor, parts: int, add: bool):
        (M, K), N, self.parts = a.shape, b.shape[1], parts
        columns, stages = (_part_columns(N), 4) if parts > 1 else _columns_and_stages(y)
        self.a_turned, self.b_turned = a.stride(1) != 1, b.stride(0) != 1
        tiles = ceil_div(M, TILE_ROWS), ceil_div(N, columns)
        self.grid, self.columns = (min(tiles[0] * tiles[1] * parts, processors(y)), 1, 1), columns
        self.numbers = (M, N, *tiles, ceil_div(K, DEPTH), parts)
        self.constants = {
            "STAGES": stages, "A_TURNED": self.a_turned, "B_TURNED": self.b_turned, "HAS_BIAS": bias is not None,
            "ADD": add, "PARTIAL": parts > 1, "GROUP": GROUP, "num_warps": 4,
        }  # fmt: skip
        self.sizes = tuple((list(x.shape), list(x.stride())) for x in (*self._as_they_lie(a, b), y))
        self.compiled: tuple[Any, ...] | None = None

    def _as_they_lie(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.T if self.a_turned else a, b if self.b_turned else b.T

    def __call__(self, place: Place | None, a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """``place``: of tensors whose addresses are multiples of 16; with None nothing is remembered."""
        if place is None or self.compiled is None:
            kernel = self._start(a, b, bias, y)
            if place is not None:
                rest = tuple(self.constants[name] for name in _product_kernel.arg_names[5 + len(self.numbers) :])
                self.compiled = kernel.run, kernel.function, kernel.packed_metadata, (*self.numbers, *rest)
            return
        run, function, metadata, rest = self.compiled
        of_a, of_b, of_y = self.sizes
        a_desc, b_desc = _Tiles(a, *of_a), _Tiles(b, *of_b)  # turned or not, they lie at one address
        y_desc = None if self.parts > 1 else _Tiles(y, *of_y)
        operands = a_desc, b_desc, y_desc, y.data_ptr(), None if bias is None else bias.data_ptr()
        run(*self.grid, place[1], function, metadata, None, None, None, *operands, *rest)

    def _start(self, a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor) -> Any:
        a, b = self._as_they_lie(a, b)
        a_desc = _described(a, [DEPTH, ROWS] if self.a_turned else [ROWS, DEPTH])
        b_desc = _described(b, [DEPTH, self.columns] if self.b_turned else [self.columns, DEPTH])
        y_desc = None if self.parts > 1 else _described(y, [ROWS, self.columns])
        with on_device(a):
            return _product_kernel[self.grid](a_desc, b_desc, y_desc, y, bias, *self.numbers, **self.constants)
