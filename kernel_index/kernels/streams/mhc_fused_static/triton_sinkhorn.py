"""Sinkhorn's alternating normalisation of many small matrices in one launch each way.

A program holds a matrix [N, N] in registers; ``kept`` has the logarithms after each of the 2·iters half-steps, which
are what backward needs: with y = x − log Σ exp(x), dx = dy − exp(y)·Σ dy, over the same rows or columns.
"""

import math

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device


@jit
def _matrix(p, n, N: tl.constexpr):
    """Pointers to a dense [n, n] matrix, and which of [N, N] exist."""
    o = tl.arange(0, N)
    return p + o[:, None] * n + o[None, :], (o < n)[:, None] & (o < n)[None, :]


@jit
def _half_step(x, m, least, AXIS: tl.constexpr):
    """x − log(Σ exp(x) + exp(least)) over rows (AXIS 1) or columns."""
    largest = tl.maximum(tl.max(tl.where(m, x, float("-inf")), AXIS), least)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # of a row that does not exist
    if AXIS == 1:
        total = tl.sum(tl.where(m, tl.exp(x - largest[:, None]), 0.0), 1) + tl.exp(least - largest)
        return x - (largest + tl.log(total))[:, None]
    total = tl.sum(tl.where(m, tl.exp(x - largest[None, :]), 0.0), 0) + tl.exp(least - largest)
    return x - (largest + tl.log(total))[None, :]


@jit
def _forward_kernel(logits_ptr, out_ptr, kept_ptr, n, iters, temperature, least, KEEP: tl.constexpr, N: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    p, m = _matrix(logits_ptr + program * n * n, n, N)
    x = tl.load(p, mask=m, other=0.0).to(tl.float32) / temperature
    for i in range(0, iters):
        x = _half_step(x, m, least, 1)
        if KEEP:
            tl.store(_matrix(kept_ptr + ((program * iters + i) * 2) * n * n, n, N)[0], x, mask=m)
        x = _half_step(x, m, least, 0)
        if KEEP:
            tl.store(_matrix(kept_ptr + ((program * iters + i) * 2 + 1) * n * n, n, N)[0], x, mask=m)
    tl.store(_matrix(out_ptr + program * n * n, n, N)[0], tl.exp(x), mask=m)


@jit
def _backward_kernel(g_ptr, kept_ptr, d_logits_ptr, n, iters, temperature, N: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    p, m = _matrix(g_ptr + program * n * n, n, N)
    last = tl.load(_matrix(kept_ptr + (program * iters * 2 + 2 * iters - 1) * n * n, n, N)[0], mask=m, other=0.0)
    d = tl.load(p, mask=m, other=0.0).to(tl.float32) * tl.where(m, tl.exp(last), 0.0)
    for i in range(0, iters):
        p_kept = kept_ptr + (program * iters + iters - 1 - i) * 2 * n * n
        y = tl.load(_matrix(p_kept + n * n, n, N)[0], mask=m, other=0.0)
        d -= tl.where(m, tl.exp(y), 0.0) * tl.sum(d, 0)[None, :]
        y = tl.load(_matrix(p_kept, n, N)[0], mask=m, other=0.0)
        d -= tl.where(m, tl.exp(y), 0.0) * tl.sum(d, 1)[:, None]
    p_out = _matrix(d_logits_ptr + program * n * n, n, N)[0]
    tl.store(p_out, (d / temperature).to(d_logits_ptr.dtype.element_ty), mask=m)


def forward(logits: Tensor, out: Tensor, kept: Tensor, temperature: float, eps: float, iters: int) -> None:
    """Contiguous logits [M, n, n] in; ``out``, and ``kept`` [M, 2·iters, n, n] unless it is empty, filled."""
    if logits.numel():
        n, least = logits.shape[-1], math.log(eps) if eps else -math.inf
        with on_device(logits):
            _forward_kernel[(logits.shape[0],)](
                logits, out, kept, n, iters, temperature, least,
                KEEP=kept.numel() > 0, N=next_power_of_2(n), num_warps=1,
            )  # fmt: skip


def backward(g: Tensor, kept: Tensor, temperature: float, d_logits: Tensor) -> None:
    if g.numel():
        n = g.shape[-1]
        with on_device(g):
            _backward_kernel[(g.shape[0],)](
                g, kept, d_logits, n, kept.shape[1] // 2, temperature, N=next_power_of_2(n), num_warps=1
            )  # fmt: skip
