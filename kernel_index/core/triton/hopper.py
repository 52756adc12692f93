"""Parts of the Hopper kernels of attention, in Gluon: tiles come by TMA, products are wgmma, and warps have roles.

A program has two or three consumers, each a warpgroup with 64 rows of the tile and its accumulators in registers, and a
producer, one warp that copies tiles to shared memory.  A ring of STAGES slots joins them: the producer fills slot
``i % STAGES`` when all consumers have emptied it, and each waits for the other on a barrier whose phase is
``(i // STAGES) & 1``.  Products are asynchronous: those of the next scores run while the softmax of the last is
computed.

Names and units are those of ``core/triton/attention.py``; ``x_desc`` describes a tensor to the copy engine.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernel_index.core.triton.jit import Ahead, ShortWay

LOG2E = gl.constexpr(1.4426950408889634)

ROWS = 64
"""Of a consumer."""

TWO, THREE = gl.constexpr(((4, 1), (240, 24))), gl.constexpr(((4, 4, 1), (160, 160, 24)))
"""Warps and registers of the consumers behind the first one, which is the program's own four warps, and the producer:
65536 registers in all."""

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


class HopperKernel(Ahead, GluonJITFunction):
    """The decorator of a kernel, as ``jit`` is of one in Triton; its launches name ``ENABLE_FP_FUSION`` themselves."""


class QuickHopperKernel(ShortWay, HopperKernel):
    """With the short way to a launch, which names it."""


def tiles_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of ``rows`` tokens of one head of x [B, T, H, D]; rows behind the last token are zeros."""
    block = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], block, layout)


def rows_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Stretches of ``rows`` numbers of x [B, H, T], float32, whose heads begin at multiples of 16 bytes."""
    shape, strides = [x.shape[0] * x.shape[1], x.shape[2]], [x.stride(1), 1]  # flattened, one head has another stride
    return TensorDescriptor(x, shape, strides, [1, rows], gl.NVMMASharedLayout(0, 32, 2))


def has_tiles(x: Tensor) -> bool:
    """Whether the copy engine takes x [B, T, H, D] as it lies."""
    steps = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that are passed after ARRIVALS arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def ring(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of a descriptor, each [rows, columns]."""
    ROWS: gl.constexpr = desc.block_type.shape[1]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], desc.dtype)
    return gl.allocate_shared_memory(desc.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)


@gluon.jit
def copy_tile(desc, b, first, head, barrier, slot):
    """Start the copy of the tile of batch row b and one head that begins at token ``first``."""
    target = slot._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [b, first, head, 0], barrier, target)


@gluon.jit
def product_nt(a, b, zero):
    """a·bᵀ, started; both are tiles in shared memory."""
    return warpgroup_mma(a, b.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def window_tiles(start_ptr, end_ptr, first, ROWS, BLOCK: gl.constexpr, STEP: gl.constexpr):
    """See ``window_tiles`` of ``core/triton/attention.py``."""
    last = gl.minimum(first + BLOCK, ROWS) - 1
    low = gl.load(start_ptr + first) // STEP
    high = gl.cdiv(gl.load(end_ptr + last), STEP)
    full_low = gl.minimum(gl.maximum(gl.cdiv(gl.load(start_ptr + last), STEP), low), high)
    full_high = gl.maximum(gl.load(end_ptr + first) // STEP, full_low)
    return low, full_low - low, full_high - full_low, gl.maximum(high - full_high, 0)


@gluon.jit
def tile_at(i, low, left, full, STEP: gl.constexpr):
    """First row of the i-th tile: full ones, those masked on the left, those masked on the right."""
    j = i - full
    masked = low + j + gl.where(j < left, 0, full)
    return gl.where(i < full, low + left + i, masked) * STEP


@gluon.jit
def computed_before(passed, phase):
    """What stands in front of it is computed before a wait for products that stands behind it, as a barrier that was
    ``passed`` already is asked again.  Else the compiler moves exponentials behind the wait, and nothing overlaps."""
    mbarrier.wait(passed, phase)


@gluon.jit
def within(index, start, end):
    return (index >= start) & (index < end)


@gluon.jit
def softcapped(s, inner, CAPPED: gl.constexpr):
    """tanh(inner · s) with a softcap, as 1 − 2 / (1 + e^2x): its absolute error, not the relative one, is that of a
    logit, and two instructions of the special function unit are fewer than any other form of this accuracy has."""
    if CAPPED:
        e = gl.exp2(s * (inner * 2.0 * LOG2E))
        s = 1.0 - 2.0 * _reciprocal(1.0 + e)
    return s


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def store_tile(p_base, first, row_stride, value, ROWS, COLUMNS: gl.constexpr):
    """64 rows from ``first`` on, as far as they exist, in stores of 16 bytes."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    value = gl.convert_layout(value.to(p_base.dtype.element_ty), LAYOUT)
    o_row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    o_column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    p_row = p_base + o_row.to(gl.int64)[:, None] * row_stride
    gl.store(p_row + o_column[None, :], value, mask=(o_row < ROWS)[:, None])
