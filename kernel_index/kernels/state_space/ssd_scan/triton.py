"""Launches: three forward, and nine backward, which makes the states again instead of keeping them.

1. ``triton_steps``: step sizes and decays.  2. ``triton_states``: the state that enters each chunk, one after another.
3. ``triton_forward``: y of all chunks at once.  Backward the same walk from the end for the gradients of the states,
then all chunks at once, then what heads share.  docs/decisions/0023 says why the states are walked in registers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core.triton.launch import Config, ceil_div, dot_block, interpreting, on_device, processors
from kernel_index.core.triton.sums import sum_parts
from kernel_index.kernels.state_space.ssd_scan.geometry import Sizes, chunks_config, walk_config
from kernel_index.kernels.state_space.ssd_scan.triton_backward import (
    group_kernel,
    products_kernel,
    through_states_kernel,
    within_chunk_kernel,
)
from kernel_index.kernels.state_space.ssd_scan.triton_forward import scan_kernel
from kernel_index.kernels.state_space.ssd_scan.triton_states import states_kernel
from kernel_index.kernels.state_space.ssd_scan.triton_steps import steps_backward_kernel, steps_kernel

STEP_TOKENS, STEP_HEADS = 64, 16
"""Of a tile of ``steps_backward_kernel``; ``steps_kernel`` takes a chunk of as many heads."""


class Inputs(NamedTuple):
    """The tensors of a call as kernels read them: x, b, c with dense columns, the small ones contiguous."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    dt_bias: Tensor | None
    segments: Tensor | None
    state: Tensor | None
    dt_softplus: bool

    @property
    def segments_row(self) -> int:
        """From one batch row of segments to the next."""
        return 0 if self.segments is None or self.segments.shape[0] == 1 else self.segments.shape[1]


def _steps(inputs: Inputs, sizes: Sizes) -> Tensor:
    padded = sizes.chunks * sizes.chunk
    steps = torch.empty((3, sizes.B, sizes.H, padded), dtype=torch.float32, device=inputs.x.device)
    steps_kernel[(sizes.B * sizes.chunks, ceil_div(sizes.H, STEP_HEADS))](
        inputs.dt, inputs.a, inputs.dt_bias, inputs.segments, steps, *inputs.dt.stride(), inputs.segments_row,
        sizes.B, sizes.T, sizes.H, sizes.chunks,
        BIAS=inputs.dt_bias is not None, SOFTPLUS=inputs.dt_softplus, SEGMENTS=inputs.segments is not None,
        Q=sizes.chunk, BH=STEP_HEADS, num_warps=4,
    )  # fmt: skip
    return steps


def _walk(
    left: Tensor, right: Tensor, inputs: Inputs, steps: Tensor, sizes: Sizes, first: Tensor | None,
    last: Tensor | None, reverse: bool,
) -> Tensor:  # fmt: skip
    states = left.new_empty((sizes.B, sizes.chunks, sizes.H, sizes.P, sizes.N))
    config = walk_config(sizes, left)
    grid = sizes.B * sizes.H, ceil_div(sizes.P, config.tile), ceil_div(sizes.N, config.step)
    states_kernel[grid](
        left, right, steps, inputs.segments, first, states, last, *left.stride()[:3], *right.stride()[:3],
        inputs.segments_row, sizes.B, sizes.T, sizes.H, sizes.heads_of_group, sizes.chunks,
        FIRST=first is not None, LAST=last is not None, SEGMENTS=inputs.segments is not None, REVERSE=reverse,
        UPCAST=interpreting(), P=sizes.P, N=sizes.N, Q=sizes.chunk, BP=config.tile, BN=config.step,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return states


def _constants(inputs: Inputs, sizes: Sizes, config: Config) -> dict[str, Any]:
    blocks = {"BLOCK_P": dot_block(sizes.P), "BLOCK_N": dot_block(sizes.N)}
    flags = {"SKIP": inputs.d is not None, "SEGMENTS": inputs.segments is not None, "UPCAST": interpreting()}
    geometry = {"Q": sizes.chunk, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return flags | {"P": sizes.P, "N": sizes.N} | blocks | geometry


def forward(inputs: Inputs, y: Tensor, last: Tensor) -> None:
    """``y`` [B, T, H, P] and ``last`` [B, H, P, N] are filled."""
    sizes = Sizes.of(inputs.x, inputs.b)
    if sizes.B == 0:
        return
    x, b, c = inputs.x, inputs.b, inputs.c
    with on_device(x):
        steps = _steps(inputs, sizes)
        states = _walk(x, b, inputs, steps, sizes, inputs.state, last, reverse=False)
        config = chunks_config(sizes, x, "forward")
        scan_kernel[(sizes.B * sizes.chunks, sizes.G * ceil_div(sizes.heads_of_group, config.tile))](
            x, b, c, steps, inputs.segments, states, inputs.d, y, *x.stride()[:3], *b.stride()[:3], *c.stride()[:3],
            inputs.segments_row, sizes.B, sizes.T, sizes.H, sizes.heads_of_group, sizes.chunks, config.tile,
            **_constants(inputs, sizes, config),
        )  # fmt: skip


class Outputs(NamedTuple):
    """Gradients, to be filled; those of a, dt_bias and d are the rows of ``of_heads`` [3, H], float32."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    of_heads: Tensor
    state: Tensor


def backward(inputs: Inputs, d_y: Tensor, d_last: Tensor | None, outputs: Outputs) -> None:
    """``d_y`` has dense columns; ``d_last`` is contiguous."""
    sizes = Sizes.of(inputs.x, inputs.b)
    if sizes.B == 0:
        outputs.of_heads.zero_()
        return
    x, b, c = inputs.x, inputs.b, inputs.c
    with on_device(x):
        steps = _steps(inputs, sizes)
        states = _walk(x, b, inputs, steps, sizes, inputs.state, None, reverse=False)
        d_states = _walk(d_y, c, inputs, steps, sizes, d_last, outputs.state, reverse=True)
        d_steps = _chunks_backward(inputs, sizes, d_y, steps, states, d_states, outputs)
        _steps_backward(inputs, sizes, steps, d_steps, outputs)


def _chunks_backward(
    inputs: Inputs, sizes: Sizes, d_y: Tensor, steps: Tensor, states: Tensor, d_states: Tensor, outputs: Outputs
) -> Tensor:
    """Fills the gradients of x, b and c; returns ``d_steps``."""
    x, b, c, of_chunks = inputs.x, inputs.b, inputs.c, (sizes.B, sizes.chunks, sizes.G)
    grid, rest = (sizes.B * sizes.chunks, sizes.G), (sizes.B, sizes.T, sizes.H, sizes.G, sizes.chunks)
    strides_b, strides_c = b.stride()[:3], c.stride()[:3]
    constants = _constants(inputs, sizes, chunks_config(sizes, x, "chunk"))
    of_group = {n: constants[n] for n in ("UPCAST", "N", "Q", "BLOCK_N")} | {"num_warps": 8}
    bc = steps.new_empty((*of_chunks, sizes.chunk, sizes.chunk))
    products_kernel[grid](b, c, bc, *strides_b, *strides_c, sizes.T, sizes.G, sizes.chunks, **of_group)
    config = chunks_config(sizes, x, "states")
    parts, ends = ceil_div(sizes.heads_of_group, config.tile), torch.empty_like(steps)
    shared = [steps.new_empty((parts, *t.shape)) for t in (b, c)]
    without_skip = {n: value for n, value in _constants(inputs, sizes, config).items() if n != "SKIP"}
    through_states_kernel[(grid[0], sizes.G * parts)](
        x, b, c, d_y, steps, inputs.segments, states, d_states, ends, *shared, *x.stride()[:3], *strides_b,
        *strides_c, *d_y.stride()[:3], inputs.segments_row, *rest, config.tile, **without_skip,
    )  # fmt: skip
    config = chunks_config(sizes, x, "chunk")
    square_parts, d_steps = ceil_div(sizes.heads_of_group, config.tile), torch.empty_like(steps)
    squares = steps.new_empty((square_parts, *bc.shape))
    within_chunk_kernel[(grid[0], sizes.G * square_parts)](
        x, b, d_y, steps, inputs.segments, d_states, bc, inputs.d, ends, outputs.x, d_steps, squares, *x.stride()[:3],
        *strides_b, *d_y.stride()[:3], inputs.segments_row, *rest, config.tile, **constants,
    )  # fmt: skip
    group_kernel[grid](
        b, c, inputs.segments, *shared, squares, outputs.b, outputs.c, *strides_b, *strides_c, inputs.segments_row,
        sizes.B, sizes.T, sizes.G, sizes.chunks, parts, square_parts, SEGMENTS=constants["SEGMENTS"], **of_group,
    )  # fmt: skip
    return d_steps


def _steps_backward(inputs: Inputs, sizes: Sizes, steps: Tensor, d_steps: Tensor, outputs: Outputs) -> None:
    tiles = ceil_div(sizes.T, STEP_TOKENS)
    programs = min(sizes.B * tiles, processors(steps))
    parts = steps.new_empty((programs, 3 * sizes.H))
    steps_backward_kernel[(programs, ceil_div(sizes.H, STEP_HEADS))](
        d_steps, steps, inputs.dt, inputs.a, inputs.dt_bias, outputs.dt, parts, *inputs.dt.stride(),
        sizes.B, sizes.T, sizes.H, steps.shape[-1], tiles,
        BIAS=inputs.dt_bias is not None, SOFTPLUS=inputs.dt_softplus, BT=STEP_TOKENS, BH=STEP_HEADS, num_warps=4,
    )  # fmt: skip
    sum_parts(parts, outputs.of_heads.view(-1))
