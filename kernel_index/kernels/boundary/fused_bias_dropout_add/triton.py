"""One launch forward; backward one launch and, for the bias, one small reduction in a fixed order.

The mask is never in memory: a program rebuilds it from the seed, one Philox call for four elements that lie 16 apart
(docs/decisions/0003-dropout-mask.md).  Data is loaded and stored in runs of whole vectors; only the flags, one for each
element, are brought from the order of the calls into the order of the elements.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors
from kernel_index.core.triton.sums import MOST_PARTS, dependent, sum_parts

BLOCK, PLAIN_BLOCK, FEW_BLOCK, FEW_PLAIN_BLOCK = 4096, 2048, 1024, 512
"""Elements of a program of the pass over flat memory, with a mask and without: the fastest tried on an H200.

FEW_BLOCK with a mask, where there would be less than two programs for each processor.  FEW_PLAIN_BLOCK without one,
where there would be less than one, with half the warps: 128 × 1024 took 1.35 µs for 1.61, in blocks of 1024 1.45.
"""

COLUMNS, ROWS, RUNS = 2048, 2, 2
"""The tile of the pass that sums over rows, and its programs for each processor: the fastest tried on an H100."""

PLAIN_COLUMNS, PLAIN_ROWS, PLAIN_RUNS = 1024, 4, 2
"""The same without a mask, on an H200."""

FEW_DROPPED = (1024, 2, 2)
"""The same with a mask for up to FEW_ROWS rows: on an H200 3.6 us for 4.0 at 128 rows of 4096, 4.5 for 5.0 of 7168."""

GROUP = 64
"""Elements of the mask that are made together: a tile has whole groups."""

FEW_ROWS, FEW_AT_ONCE, FEW_COLUMNS = 256, 128, 16
"""Rows up to which a program sums whole columns by itself, so many at once: no second launch.

Not with a mask: what it takes to make it keeps more processors busy than there are such programs.  With the 64 columns
of a group for each, 128 rows of 4096 took 5.3 us for 5.2, of 1024 4.6 for 4.3.
"""

STAGES, PLAIN_STAGES = 3, 5
"""Tiles of it in flight, with a mask and without."""

Mask = tuple[Tensor | None, int | None, float | None]
"""(seed, threshold, factor), all None without dropout."""


@jit
def _philox(c0, c1, seed):
    """Four words for each call, whose number is ``c1 · 2³² + c0``: Philox-4x32-10, one widening product a factor.

    What depends on ``c1`` alone is computed at its own, smaller shape.
    """
    c2 = c0 & 0
    c3 = c2
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = (b & 0xFFFFFFFF).to(tl.uint32), (a & 0xFFFFFFFF).to(tl.uint32)
        k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return c0, c1, c2, c3  # each of c0's shape


@jit
def _kept(word, threshold):
    """``word >= threshold`` in 32 bits, though the threshold of p = 1 is 2³²; the outer test is of one scalar."""
    return (word > ((threshold - 1) & 0xFFFFFFFF).to(tl.uint32)) | (threshold == 0)


@jit
def _keep_groups(group, seed, threshold, GROUPS: tl.constexpr):
    """The flags of whole groups of 64 elements, ``group`` ``[GROUPS]``, in the order of the elements.

    A thread holds all of the first dimension: the eight neighbours of one group, which have the upper half of the
    counter in common and go to one vector of elements.
    """
    lane = tl.arange(0, 8)[:, None, None] + 8 * tl.arange(0, 2)[None, None, :]  # [8, 1, 2]
    group = group[None, :, None]  # [1, GROUPS, 1]
    low = ((group << 4) & 0xFFFFFFFF).to(tl.uint32) | lane.to(tl.uint32)
    w0, w1, w2, w3 = _philox(low, ((group >> 28) & 0xFFFFFFFF).to(tl.uint32), seed)  # [8, GROUPS, 2]
    k0, k1 = _kept(w0, threshold).to(tl.int8), _kept(w1, threshold).to(tl.int8)
    k2, k3 = _kept(w2, threshold).to(tl.int8), _kept(w3, threshold).to(tl.int8)
    words = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (8, GROUPS, 2, 4))  # the last index is the word's
    return tl.reshape(tl.permute(words, (1, 3, 2, 0)), (GROUPS * 64,)) != 0


@jit
def _keep_elements(e, seed, threshold):
    """The flag of each element, where elements do not come in whole groups: four times the arithmetic."""
    call = (e // 64) * 16 + e % 16
    w0, w1, w2, w3 = _philox((call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32), seed)
    j = (e // 16) % 4
    return _kept(tl.where(j == 0, w0, tl.where(j == 1, w1, tl.where(j == 2, w2, w3))), threshold)


@jit
def _seed(seed_ptr, INVERTED: tl.constexpr):
    seed = tl.load(seed_ptr)
    return ~seed if INVERTED else seed


@jit
def _flat_kernel(
    x_ptr, residual_ptr, bias_ptr, out_ptr, seed_ptr, threshold, factor, size, width,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    INVERTED: tl.constexpr,
):  # fmt: skip
    """out = residual + dropout(x + bias), each of residual, bias and dropout optional, over flat memory."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o_x = tl.arange(0, BLOCK)  # [BLOCK]
    m_x = start + o_x < size
    y = tl.load(x_ptr + start + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
    if BIAS:
        o_d = (start % width).to(tl.int32) + o_x  # [BLOCK]
        if not WHOLE_BLOCKS:
            o_d = o_d % width
        y += tl.load(bias_ptr + o_d, mask=m_x, other=0.0).to(tl.float32)
    r = tl.zeros((BLOCK,), tl.float32)
    if RESIDUAL:
        r = tl.load(residual_ptr + start + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
    if DROP:
        o_group = start // 64 + tl.arange(0, BLOCK // 64)  # [BLOCK / 64]
        seed = _seed(seed_ptr, INVERTED)
        m_keep = _keep_groups(o_group, seed, tl.full((), threshold, tl.int64), BLOCK // 64)  # [BLOCK]
        dropped = r if RESIDUAL else 0.0  # not r + 0: a dropped −0 stays −0
        y = y * factor
        y = tl.where(m_keep, r + y if RESIDUAL else y, dropped)
    elif RESIDUAL:
        y = r + y
    tl.store(out_ptr + start + o_x, y.to(out_ptr.dtype.element_ty), mask=m_x)


@jit
def _column_kernel(
    g_ptr, dx_ptr, parts_ptr, seed_ptr, threshold, factor, rows, width, rows_per_program,
    DX: tl.constexpr, DROP: tl.constexpr, WHOLE_GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENT: tl.constexpr, INVERTED: tl.constexpr,
):  # fmt: skip
    """dx, and for each run of rows the sum of dx over them."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the sum's programs, which wait
    run = tl.program_id(0).to(tl.int64)
    first = run * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    first_column = tl.program_id(1) * COLUMNS
    o_d = first_column + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    if DROP:
        seed = _seed(seed_ptr, INVERTED)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        o_n = tl.arange(0, ROWS).to(tl.int64)[:, None] + start  # [ROWS, 1]
        m_x = (o_n < last) & (o_d < width)
        o_x = o_n * width + o_d  # [ROWS, COLUMNS]
        if DROP:
            if WHOLE_GROUPS:
                PER_ROW: tl.constexpr = COLUMNS // 64
                n = tl.arange(0, ROWS * PER_ROW)
                o_group = (start + (n // PER_ROW).to(tl.int64)) * (width // 64) + first_column // 64 + n % PER_ROW
                m_keep = _keep_groups(o_group, seed, tl.full((), threshold, tl.int64), ROWS * PER_ROW)
                m_keep = tl.reshape(m_keep, (ROWS, COLUMNS))
            else:
                m_keep = _keep_elements(o_x, seed, tl.full((), threshold, tl.int64))  # [ROWS, COLUMNS]
        dx = tl.load(g_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
        if DROP:
            dx = tl.where(m_keep, dx * factor, 0.0)
        if DX:
            tl.store(dx_ptr + o_x, dx.to(dx_ptr.dtype.element_ty), mask=m_x)
        acc += dx  # 0 where nothing was loaded: the factor is finite
    o_part = first_column + tl.arange(0, COLUMNS)  # [COLUMNS]
    total = tl.sum(acc, 0).to(parts_ptr.dtype.element_ty)
    tl.store(parts_ptr + run * width + o_part, total, mask=o_part < width)


def flat(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, mask: Mask, out: Tensor, *, inverted: bool = False
) -> Tensor:
    if out.numel():
        width = x.shape[-1] if x.ndim else 1
        plain = mask[0] is None
        many, little = (PLAIN_BLOCK, FEW_PLAIN_BLOCK) if plain else (BLOCK, FEW_BLOCK)
        few = out.numel() < processors(out) * (many if plain else 2 * many)
        block = little if few else many
        with on_device(x):
            _flat_kernel[(ceil_div(out.numel(), block),)](
                x, residual, bias, out, *mask, out.numel(), width,
                RESIDUAL=residual is not None, BIAS=bias is not None, DROP=not plain,
                WHOLE_BLOCKS=width % block == 0, BLOCK=block, INVERTED=inverted, num_warps=4 if few and plain else 8,
            )  # fmt: skip
    return out


def _tile(rows: int, width: int, dropped: bool) -> tuple[int, int, int]:
    """Columns and rows of a tile, and programs for each processor; a narrow tile has as many elements in more rows."""
    of_mask = FEW_DROPPED if rows <= FEW_ROWS else (COLUMNS, ROWS, RUNS)
    most, held, each = of_mask if dropped else (PLAIN_COLUMNS, PLAIN_ROWS, PLAIN_RUNS)
    columns = max(GROUP, min(most, next_power_of_2(width)))
    return columns, held * most // columns, each


def runs_of(rows: int, width: int, like: Tensor, dropped: bool = True) -> int:
    """Runs of rows, and rows of the partial sums, which are about 3 % of the traffic."""
    columns, at_once, each = _tile(rows, width, dropped)
    return max(1, min(ceil_div(rows, at_once), MOST_PARTS, ceil_div(each * processors(like), ceil_div(width, columns))))


def columns(
    g: Tensor, mask: Mask, dx: Tensor | None, dbias: Tensor, *, inverted: bool = False
) -> tuple[Tensor | None, Tensor]:
    """g ``[rows, width]``; fills dx, if wanted, and dbias, which is summed in float32 and stored in its dtype."""
    rows, width = g.shape
    if rows == 0 or width == 0:
        return dx, dbias.zero_()
    dropped = mask[0] is not None
    if rows <= FEW_ROWS and not dropped:
        at_once = min(FEW_AT_ONCE, next_power_of_2(rows))
        with on_device(g):
            _column_kernel[(1, ceil_div(width, FEW_COLUMNS))](
                g, dx, dbias, *mask, rows, width, rows,
                DX=dx is not None, DROP=False, WHOLE_GROUPS=False, ROWS=at_once, COLUMNS=FEW_COLUMNS,
                STAGES=1, DEPENDENT=False, INVERTED=False, num_warps=max(1, at_once * FEW_COLUMNS // 512),
            )  # fmt: skip
        return dx, dbias
    tile_columns, tile_rows, _ = _tile(rows, width, dropped)
    each = tile_rows * ceil_div(rows, tile_rows * runs_of(rows, width, g, dropped))
    runs = ceil_div(rows, each)
    parts = torch.empty((runs, width), dtype=torch.float32, device=g.device)
    with on_device(g):
        _column_kernel[(runs, ceil_div(width, tile_columns))](
            g, dx, parts, *mask, rows, width, each,
            DX=dx is not None, DROP=dropped, WHOLE_GROUPS=width % 64 == 0,
            ROWS=tile_rows, COLUMNS=tile_columns, STAGES=STAGES if dropped else PLAIN_STAGES,
            DEPENDENT=dependent(g), INVERTED=inverted, num_warps=4,
        )  # fmt: skip
    return dx, sum_parts(parts, dbias)
