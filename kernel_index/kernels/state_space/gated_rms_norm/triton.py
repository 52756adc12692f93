"""One launch forward; backward one launch over the rows and one small reduction in a fixed order.

A program holds a group of a row in registers.  Names are those of ``core/triton/attention.py``: ``o_d`` and ``m_d``
[BLOCK] are the channels of a group and which of them exist, ``o_r`` [ROWS, 1] the rows of a step.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors
from kernel_index.core.triton.row import load_row, store_row
from kernel_index.core.triton.sums import sum_parts

STAGES = 3
"""Steps in flight in the backward pass."""

STEP = 4096
"""Elements of a step of the backward pass: as many rows as hold them.  One narrow row would not fill a processor."""


def pick_config(width: int) -> dict[str, int]:
    """Block and warps of the forward pass for a group of ``width`` channels: 16 for each thread."""
    block = next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def pick_backward_config(width: int, rows: int) -> dict[str, int]:
    """Rows and channels of a step, 8 elements for each thread; no more rows than there are for each processor."""
    block = next_power_of_2(width)
    held = max(1, min(STEP // block, next_power_of_2(rows)))
    return {"ROWS": held, "BLOCK": block, "num_warps": min(16, max(1, held * block // 256))}


@jit
def forward_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, rstd_ptr, x_row, gate_row, groups, width, eps,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    first = group * width
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    z = load_row(x_ptr + row * x_row + first, o_d, m_d)
    if GATED:
        gate = load_row(gate_ptr + row * gate_row + first, o_d, m_d)
        z = z * (gate * tl.sigmoid(gate))
    rstd = tl.rsqrt(tl.sum(z * z, 0) / width + eps)
    tl.store(rstd_ptr + row * groups + group, rstd)
    store_row(y_ptr + row * groups * width + first, o_d, z * rstd * load_row(weight_ptr + first, o_d, m_d), m_d)


@jit
def backward_kernel(
    d_y_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, d_x_ptr, d_gate_ptr, parts_ptr, d_y_row, x_row, gate_row, rows,
    groups, width, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes each ``num_programs``-th step of one group; ``parts`` [programs, C] are its sums for weight."""
    program, group = tl.program_id(0), tl.program_id(1)
    first = group * width
    o_d = tl.arange(0, BLOCK)[None, :]
    m_d = o_d < width
    w = load_row(weight_ptr + first, o_d, m_d)  # [1, BLOCK]
    d_w = tl.zeros((ROWS, BLOCK), tl.float32)
    steps = tl.cdiv(rows, ROWS)
    for i in tl.range(0, tl.cdiv(steps - program, tl.num_programs(0)), num_stages=STAGES):
        o_r = (program + i * tl.num_programs(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        m = (o_r < rows) & m_d  # [ROWS, BLOCK]
        out = o_r * groups * width + first
        x = load_row(x_ptr, o_r * x_row + first + o_d, m)
        dy = load_row(d_y_ptr, o_r * d_y_row + first + o_d, m)
        rstd = tl.load(rstd_ptr + o_r * groups + group, mask=o_r < rows, other=0.0)  # [ROWS, 1]
        z_hat = x * rstd
        if GATED:
            gate = load_row(gate_ptr, o_r * gate_row + first + o_d, m)
            s = tl.sigmoid(gate)
            silu = gate * s
            z_hat = x * silu * rstd
        d_w += dy * z_hat
        d_hat = dy * w
        d_z = rstd * (d_hat - z_hat * (tl.sum(d_hat * z_hat, 1) / width)[:, None])
        if GATED:
            store_row(d_gate_ptr, out + o_d, d_z * x * (s + silu * (1.0 - s)), m)
            d_z = d_z * silu
        store_row(d_x_ptr, out + o_d, d_z, m)
    p_part = parts_ptr + program.to(tl.int64) * groups * width + first
    tl.store(p_part + tl.arange(0, BLOCK), tl.sum(d_w, 0), mask=tl.arange(0, BLOCK) < width)


def forward(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, y: Tensor, rstd: Tensor) -> None:
    """Rows [N, C] with dense channels in; ``y`` and ``rstd`` filled."""
    rows, width = x.shape[0], x.shape[1] // groups
    if rows:
        with on_device(x):
            forward_kernel[(rows * groups,)](
                x, gate, weight, y, rstd, x.stride(0), 0 if gate is None else gate.stride(0), groups, width, eps,
                GATED=gate is not None, **pick_config(width),
            )  # fmt: skip


def backward(
    d_y: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, rstd: Tensor, outputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """``outputs``: gradients of x, gate (not written without one) and weight."""
    d_x, d_gate, d_weight = outputs
    rows, groups = x.shape[0], rstd.shape[-1]
    width = x.shape[1] // groups
    if rows == 0:
        d_weight.zero_()
        return
    most = max(1, ceil_div(processors(x), groups))
    config = pick_backward_config(width, ceil_div(rows, most))
    programs = min(ceil_div(rows, config["ROWS"]), most)
    parts = x.new_empty((programs, x.shape[1]), dtype=rstd.dtype)
    with on_device(x):
        backward_kernel[(programs, groups)](
            d_y, x, gate, weight, rstd, d_x, d_gate, parts, d_y.stride(0), x.stride(0),
            0 if gate is None else gate.stride(0), rows, groups, width, GATED=gate is not None, STAGES=STAGES, **config,
        )  # fmt: skip
        sum_parts(parts, d_weight)
