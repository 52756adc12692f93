"""Triton kernels with a known fault each, for the proofs to find."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=mask), mask=mask)


@triton.jit
def wasteful_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Reads every second element, so every sector in full for half of it."""
    at = 2 * (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    mask = at < size
    tl.store(y_ptr + at // 2, tl.load(x_ptr + at, mask=mask), mask=mask)


@triton.jit
def atomic_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + at, mask=at < size, other=0.0), 0))


@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Keeps 32768 values in four warps: 256 for each thread, more than it has registers."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x, 0))


@triton.jit
def product_and_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(y_ptr + at, x * y + x)


@triton.jit
def overwriting_kernel(x_ptr, w_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """x · (w + w²)ᵀ as two products.  w is read by one of them and into registers: of two tiles that Triton gives it,
    a copy fills the one that a product may still read."""
    o_n, o_e, o_c = tl.arange(0, 64), tl.arange(0, 16), tl.arange(0, BLOCK)
    y = tl.zeros((64, 16), tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + o_n[:, None] * width + start + o_c[None, :])
        w = tl.load(w_ptr + o_e[:, None] * width + start + o_c[None, :])
        y = tl.dot(x, tl.trans(w * w), y)
        y = tl.dot(x, tl.trans(w), y)
    tl.store(y_ptr + o_n[:, None] * 16 + o_e[None, :], y)
