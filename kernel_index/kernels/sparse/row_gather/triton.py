"""One launch gathers the rows of one tensor or of two; backward sorts the indices once and sums each row's segment."""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.numerics import is_invariant
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device

BLOCK = 2048
"""Elements of a program at most."""


RUN = 64
"""Rows of a segment that one program adds up where segments are long."""

LONG = 8
"""Indices for each row on the average from which on segments are long, as those of the letters of a text."""


def pick_config(*widths: int) -> dict:
    block = min(BLOCK, next_power_of_2(max(widths)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


@jit
def _gather_kernel(
    a_ptr, b_ptr, idx_ptr, a_out_ptr, b_out_ptr, rows, a_width, b_width, PAIR: tl.constexpr, BLOCK: tl.constexpr
):
    o_out = tl.program_id(0).to(tl.int64)
    row = tl.load(idx_ptr + o_out).to(tl.int64)
    in_range = (row >= 0) & (row < rows)
    tl.device_assert(in_range, "index out of range")  # as index_select: the device stops
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_row = tl.load(a_ptr + row * a_width + o_d, mask=(o_d < a_width) & in_range)  # [BLOCK]
    tl.store(a_out_ptr + o_out * a_width + o_d, b_row, mask=o_d < a_width)
    if PAIR:
        b_row = tl.load(b_ptr + row * b_width + o_d, mask=(o_d < b_width) & in_range)  # [BLOCK]
        tl.store(b_out_ptr + o_out * b_width + o_d, b_row, mask=o_d < b_width)


@jit
def _sum_segment(g_ptr, order_ptr, first, last, p_out, width, o_d, BLOCK: tl.constexpr):
    """Columns ``o_d`` [BLOCK] of the sum of the gradient's rows ``order[first:last]``."""
    m_d = o_d < width
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, last):
        row = tl.load(order_ptr + i)
        acc += tl.load(g_ptr + row * width + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(p_out + o_d, acc.to(p_out.dtype.element_ty), mask=m_d)


@jit
def _add_up_kernel(
    g_ptr, h_ptr, order_ptr, starts_ptr, g_out_ptr, h_out_ptr, g_width, h_width,
    G: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every row of the gradient is written once; rows that no index names get zeros."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if G:
        _sum_segment(g_ptr, order_ptr, first, last, g_out_ptr + row * g_width, g_width, o_d, BLOCK)
    if H:
        _sum_segment(h_ptr, order_ptr, first, last, h_out_ptr + row * h_width, h_width, o_d, BLOCK)


def _width(t: Tensor | None) -> int:
    return 0 if t is None else t.shape[1] * t.shape[2]


def gather(a: Tensor, b: Tensor | None, idx: Tensor, a_out: Tensor, b_out: Tensor) -> None:
    """Contiguous ``[N, H, D]`` in; ``[R, H, D]`` filled."""
    if idx.device.type == "cpu" and bool(((idx < 0) | (idx >= a.shape[0])).any()):  # what the interpreter would read
        raise IndexError("index out of range in self")
    widths = _width(a), _width(b)
    config = pick_config(*widths)
    with on_device(a):
        _gather_kernel[(idx.shape[0], ceil_div(max(widths), config["BLOCK"]))](
            a, b, idx, a_out, b_out, a.shape[0], *widths, PAIR=b is not None,
            debug=True, sanitize_overflow=False, **config,
        )  # fmt: skip


def add_up(g: Tensor | None, h: Tensor | None, idx: Tensor, g_out: Tensor, h_out: Tensor) -> None:
    """Contiguous gradients ``[R, H, D]``, either None; ``[N, H, D]`` filled.  The sort is stable: a fixed order."""
    rows = (h_out if g is None else g_out).shape[0]
    ordered, order = torch.sort(idx, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(rows + 1, device=idx.device, dtype=idx.dtype))
    if is_invariant() or len(idx) >= LONG * rows:  # in the mode a row's order must not follow the number of others
        g, h, order, starts = _in_runs(g, h, order, starts)
    _add_up(g, h, order, starts, g_out, h_out)


def _in_runs(
    g: Tensor | None, h: Tensor | None, order: Tensor, starts: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Float32 sums of up to ``RUN`` rows of a segment each, their order, and where the sums of each row start."""
    runs = (starts.diff() + RUN - 1) // RUN
    firsts = torch.nn.functional.pad(runs.cumsum(0), (1, 0))
    most = len(order) // RUN + len(runs)  # the number of runs is known on the device alone
    run = torch.arange(most + 1, device=order.device)
    row = (torch.searchsorted(firsts, run, right=True) - 1).clamp(max=len(runs) - 1)
    begins = torch.minimum(starts[row] + (run - firsts[row]) * RUN, starts[-1])
    sums = [None if x is None else x.new_empty((most, *x.shape[1:]), dtype=torch.float32) for x in (g, h)]
    _add_up(g, h, order, begins, *(order if x is None else x for x in sums))
    return *sums, run, firsts


def _add_up(g: Tensor | None, h: Tensor | None, order: Tensor, starts: Tensor, g_out: Tensor, h_out: Tensor) -> None:
    widths = _width(g), _width(h)
    config = pick_config(*widths)
    with on_device(order):
        _add_up_kernel[(len(starts) - 1, ceil_div(max(widths), config["BLOCK"]))](
            g, h, order, starts, g_out, h_out, *widths, G=g is not None, H=h is not None, **config
        )
