"""One launch forward; backward one launch and the sum of its partials of the gradients of weight and bias.

A program walks over a run of tokens with a block of channels: the last inputs, and backward the last gradients, stay in
registers, so that each is read once.  Position 0 is the first token, −1 the last row of the state.  Values of BC
channels: ``x0`` to ``x3`` are the inputs at t to t − 3, ``w0`` to ``w3`` the taps that multiply them, ``g0`` to ``g3``
the gradients of the sum z at t to t − 3.
"""

from typing import Any

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import narrow
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2, on_device, processors
from kernel_index.core.triton.sums import sum_parts

CHANNELS, RUN = 256, 128
"""Channels of a program: two of each thread; and tokens of its run, fewer where rows are few."""

PROGRAMS = 16
"""Of the backward pass for each processor, at most: each has a row of partial sums."""


@jit
def _row(p_x, x_t, t, o_c, T, C):
    """The row at position t as it is stored, which a program asks for two tokens before it needs it; 0 beyond T."""
    t = tl.cast(t, tl.int64)
    return tl.load(p_x + t * x_t + o_c, mask=(o_c < C) & (t >= 0) & (t < T), other=0.0)


@jit
def _input(b_x, p_state, t, o_c, C, STATE: tl.constexpr, W: tl.constexpr):
    """The row of x at position t, or of the state, in float32."""
    x = b_x.to(tl.float32)
    if STATE:
        row = t + (W - 1)
        m_row = (o_c < C) & (t < 0) & (row >= 0)
        x += tl.load(p_state + tl.cast(row, tl.int64) * C + o_c, mask=m_row, other=0.0).to(tl.float32)
    return x


@jit
def _own(value, p_segments, t, back: tl.constexpr, T, SEGMENTS: tl.constexpr):
    """``value``, or 0 where the token at t is of another segment than that ``back`` tokens before."""
    if SEGMENTS and back > 0:
        here = tl.load(p_segments + tl.minimum(tl.maximum(t, 0), T - 1))
        there = tl.load(p_segments + tl.minimum(tl.maximum(t - back, 0), T - 1))
        value = tl.where(here == there, value, 0.0)
    return value


@jit
def _tap(weight_ptr, w_c, w_w, o_c, back: tl.constexpr, C, W: tl.constexpr):
    """The tap for inputs ``back`` tokens before; 0 beyond the filter."""
    if back >= W:
        return tl.zeros_like(o_c).to(tl.float32)
    return tl.load(weight_ptr + o_c * w_c + (W - 1 - back) * w_w, mask=o_c < C, other=0.0).to(tl.float32)


@jit
def _before_activation(
    bias, x0, x1, x2, x3, w0, w1, w2, w3, p_segments, t, T, SEGMENTS: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """z of the token at t."""
    z = bias + w0 * x0
    if W > 1:
        z += _own(w1 * x1, p_segments, t, 1, T, SEGMENTS)
    if W > 2:
        z += _own(w2 * x2, p_segments, t, 2, T, SEGMENTS)
    if W > 3:
        z += _own(w3 * x3, p_segments, t, 3, T, SEGMENTS)
    return z


@jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, segments_ptr, state_ptr, y_ptr, x_b, x_t, w_c, w_w, segments_b, T, C, runs,
    BIAS: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr, SEGMENTS: tl.constexpr, UPCAST: tl.constexpr,
    W: tl.constexpr, RUN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b, first = (tl.program_id(0) // runs).to(tl.int64), (tl.program_id(0) % runs) * RUN
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    p_x, p_y = x_ptr + b * x_b, y_ptr + b * T * C
    p_state = state_ptr + b * (W - 1) * C if STATE else state_ptr
    p_segments = segments_ptr + b * segments_b if SEGMENTS else segments_ptr
    w0, w1 = _tap(weight_ptr, w_c, w_w, o_c, 0, C, W), _tap(weight_ptr, w_c, w_w, o_c, 1, C, W)
    w2, w3 = _tap(weight_ptr, w_c, w_w, o_c, 2, C, W), _tap(weight_ptr, w_c, w_w, o_c, 3, C, W)
    bias = tl.zeros((BC,), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    x1 = _input(_row(p_x, x_t, first - 1, o_c, T, C), p_state, first - 1, o_c, C, STATE, W)
    x2 = _input(_row(p_x, x_t, first - 2, o_c, T, C), p_state, first - 2, o_c, C, STATE, W)
    x3 = _input(_row(p_x, x_t, first - 3, o_c, T, C), p_state, first - 3, o_c, C, STATE, W)
    b_next, b_after = _row(p_x, x_t, first, o_c, T, C), _row(p_x, x_t, first + 1, o_c, T, C)
    for t in range(first, tl.minimum(first + RUN, T)):
        x0 = b_next.to(tl.float32)
        b_next, b_after = b_after, _row(p_x, x_t, t + 2, o_c, T, C)
        z = _before_activation(bias, x0, x1, x2, x3, w0, w1, w2, w3, p_segments, t, T, SEGMENTS, W)
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(p_y + tl.cast(t, tl.int64) * C + o_c, narrow(z, y_ptr.dtype.element_ty, UPCAST), mask=o_c < C)
        x1, x2, x3 = x0, x1, x2


@jit
def backward_kernel(
    d_y_ptr, x_ptr, weight_ptr, bias_ptr, segments_ptr, state_ptr, d_x_ptr, d_state_ptr, parts_ptr,
    dy_b, dy_t, x_b, x_t, w_c, w_w, segments_b, T, C, runs, count,
    BIAS: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr, SEGMENTS: tl.constexpr, UPCAST: tl.constexpr,
    W: tl.constexpr, RUN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program takes each ``num_programs``-th run of positions, from those of the state on, of BC channels.

    At t the gradient of the input at p = t − (W − 1) is complete; it and the gradients of the taps are sums of the same
    terms.  ``parts`` [programs, W + 1, C]: the program's sums of the gradients of the taps and of the bias.
    """
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    m_c = o_c < C
    w0, w1 = _tap(weight_ptr, w_c, w_w, o_c, 0, C, W), _tap(weight_ptr, w_c, w_w, o_c, 1, C, W)
    w2, w3 = _tap(weight_ptr, w_c, w_w, o_c, 2, C, W), _tap(weight_ptr, w_c, w_w, o_c, 3, C, W)
    zero = tl.zeros((BC,), tl.float32)
    bias = zero
    # Each of them a tensor of its own: values that a loop carries under several names are lost by Triton's compiler
    # where they begin as one.
    d_bias, d_w0, d_w1 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    d_w2, d_w3 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    for run in range(tl.program_id(0), count, tl.num_programs(0)):
        b = (run // runs).to(tl.int64)
        first = (run % runs) * RUN - (W - 1 if STATE else 0)
        p_x, p_dy, p_dx = x_ptr + b * x_b, d_y_ptr + b * dy_b, d_x_ptr + b * T * C
        p_state = state_ptr + b * (W - 1) * C if STATE else state_ptr
        p_segments = segments_ptr + b * segments_b if SEGMENTS else segments_ptr
        x1 = _input(_row(p_x, x_t, first - 1, o_c, T, C), p_state, first - 1, o_c, C, STATE, W)
        x2 = _input(_row(p_x, x_t, first - 2, o_c, T, C), p_state, first - 2, o_c, C, STATE, W)
        x3 = _input(_row(p_x, x_t, first - 3, o_c, T, C), p_state, first - 3, o_c, C, STATE, W)
        g1, g2, g3 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
        b_next, b_after = _row(p_x, x_t, first, o_c, T, C), _row(p_x, x_t, first + 1, o_c, T, C)
        b_dy, b_dy_after = _row(p_dy, dy_t, first, o_c, T, C), _row(p_dy, dy_t, first + 1, o_c, T, C)
        for i in range(0, tl.minimum(RUN, T - first) + W - 1):
            t = first + i
            x0, g0 = _input(b_next, p_state, t, o_c, C, STATE, W), b_dy.to(tl.float32)
            b_next, b_after = b_after, _row(p_x, x_t, t + 2, o_c, T, C)
            b_dy, b_dy_after = b_dy_after, _row(p_dy, dy_t, t + 2, o_c, T, C)
            if SILU:
                z = _before_activation(bias, x0, x1, x2, x3, w0, w1, w2, w3, p_segments, t, T, SEGMENTS, W)
                s = tl.sigmoid(z)
                g0 = tl.where((t >= 0) & (t < T), g0 * (s + z * s * (1.0 - s)), 0.0)
            p = t - (W - 1)
            m_p = m_c & (p >= first)
            if W == 1:
                b_x, e0, e1, e2, e3 = x0, g0, zero, zero, zero
            elif W == 2:
                b_x, e0, e1, e2, e3 = x1, g1, g0, zero, zero
            elif W == 3:
                b_x, e0, e1, e2, e3 = x2, g2, g1, g0, zero
            else:
                b_x, e0, e1, e2, e3 = x3, g3, g2, g1, g0
            e1 = _own(e1, p_segments, p + 1, 1, T, SEGMENTS)
            e2 = _own(e2, p_segments, p + 2, 2, T, SEGMENTS)
            e3 = _own(e3, p_segments, p + 3, 3, T, SEGMENTS)
            b_x = tl.where(m_p, b_x, 0.0)
            d_bias += tl.where(m_p, e0, 0.0)
            d_w0 += tl.where(m_p, e0 * b_x, 0.0)
            d_w1 += tl.where(m_p, e1 * b_x, 0.0)
            d_w2 += tl.where(m_p, e2 * b_x, 0.0)
            d_w3 += tl.where(m_p, e3 * b_x, 0.0)
            d_x = w0 * e0 + w1 * e1 + w2 * e2 + w3 * e3
            p_out = p_dx + tl.cast(p, tl.int64) * C + o_c
            tl.store(p_out, narrow(d_x, d_x_ptr.dtype.element_ty, UPCAST), mask=m_p & (p >= 0))
            if STATE:
                p_before = d_state_ptr + (b * (W - 1) + (p + W - 1)) * C + o_c
                tl.store(p_before, narrow(d_x, d_state_ptr.dtype.element_ty, UPCAST), mask=m_p & (p < 0))
            x1, x2, x3 = x0, x1, x2
            g1, g2, g3 = g0, g1, g2
    p_parts = parts_ptr + tl.program_id(0).to(tl.int64) * (W + 1) * C + o_c
    tl.store(p_parts + W * C, d_bias, mask=m_c)
    tl.store(p_parts + (W - 1) * C, d_w0, mask=m_c)
    if W > 1:
        tl.store(p_parts + (W - 2) * C, d_w1, mask=m_c)
    if W > 2:
        tl.store(p_parts + (W - 3) * C, d_w2, mask=m_c)
    if W > 3:
        tl.store(p_parts, d_w3, mask=m_c)


def _constants(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, state: Tensor | None,
    activation: str | None,
) -> dict[str, Any]:  # fmt: skip
    """``RUN``: shorter where that many programs would not occupy the device."""
    B, T, C = x.shape
    taps, channels = weight.shape[1], min(CHANNELS, next_power_of_2(C))
    run = min(RUN, next_power_of_2(T))
    while run > 16 and B * ceil_div(T, run) * ceil_div(C, channels) < 8 * processors(x):
        run //= 2
    flags = {"BIAS": bias is not None, "SILU": activation == "silu", "UPCAST": interpreting()}
    flags |= {"SEGMENTS": segments is not None, "STATE": state is not None and taps > 1}
    return flags | {"W": taps, "RUN": run, "BC": channels, "num_warps": max(1, channels // 64)}


def _segments_row(segments: Tensor | None) -> int:
    return 0 if segments is None or segments.shape[0] == 1 else segments.shape[1]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, state: Tensor | None,
    activation: str | None, y: Tensor,
) -> None:  # fmt: skip
    """``y`` is filled; x has dense channels."""
    B, T, C = x.shape
    if y.numel() == 0:
        return
    constants = _constants(x, weight, bias, segments, state, activation)
    runs = ceil_div(T, constants["RUN"])
    with on_device(x):
        forward_kernel[(B * runs, ceil_div(C, constants["BC"]))](
            x, weight, bias, segments, state, y, *x.stride()[:2], *weight.stride(), _segments_row(segments), T, C, runs,
            **constants,
        )  # fmt: skip


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, state: Tensor | None,
    activation: str | None, outputs: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """``outputs``: gradients of x, of the taps and the bias [W + 1, C], of the state."""
    d_x, rows, d_state = outputs
    B, T, C = x.shape
    if x.numel() == 0:
        rows.zero_()
        return
    constants = _constants(x, weight, bias, segments, state, activation)
    before = constants["W"] - 1 if constants["STATE"] else 0
    runs, blocks = ceil_div(T + before, constants["RUN"]), ceil_div(C, constants["BC"])
    programs = min(B * runs, 512, max(1, ceil_div(PROGRAMS * processors(x), blocks)))
    parts = rows.new_empty((programs, rows.numel()))
    with on_device(x):
        backward_kernel[(programs, blocks)](
            d_y, x, weight, bias, segments, state, d_x, d_state, parts, *d_y.stride()[:2], *x.stride()[:2],
            *weight.stride(), _segments_row(segments), T, C, runs, B * runs, **constants,
        )  # fmt: skip
        sum_parts(parts, rows.view(-1))
