"""Tensors of more than 2³¹ elements: the last rows of a call, forward and backward, against a call of those rows alone.

Everything here works by rows, so the last rows do not depend on how many come before them; offsets do.  A dropout mask
does depend on the element's index: slices of it are compared with the definition's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from benchmarks.harness import console
from kernel_index.kernels.boundary.fused_bias_dropout_add import philox

WIDTH = 4096
ROWS = 2**31 // WIDTH + 64
TAIL = 32

Check = tuple[str, int, Callable[..., Any]]


def _relu(x: Tensor) -> Any:
    return ki.fused_relu_squared(x, backend="triton")


def _gated(gate: Tensor, up: Tensor) -> Any:
    return ki.fused_gated_activation(gate, up, backend="triton")


def _dropout(x: Tensor, r: Tensor) -> Any:
    return ki.fused_bias_dropout_add(x, r, p=0.0, backend="triton")


def _norm(x: Tensor, r: Tensor) -> Any:
    weight = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    return tuple(ki.fused_residual_add_rms_norm(x, r, weight, backend="triton"))


def _rope(x: Tensor, r: Tensor) -> Any:
    angles = torch.ones(x.shape[0], 1, 64, device=x.device).cumsum(-1) * 0.01
    q, k = (t.view(1, t.shape[0], -1, 128) for t in (x, r))
    return tuple(ki.fused_rope_qk(q, k, angles.cos()[None], angles.sin()[None], backend="triton"))


def _gather(x: Tensor) -> Any:
    return ki.gather_rows(x[:, None], torch.arange(x.shape[0], device=x.device), backend="triton")


LARGE: tuple[Check, ...] = (
    ("relu²", 1, _relu),
    ("SwiGLU", 2, _gated),
    ("bias + add", 2, _dropout),
    ("residual + RMSNorm", 2, _norm),
    ("RoPE of Q and K", 2, _rope),
    ("gather of rows", 1, _gather),
)


def _with_gradients(call: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results, then gradients of their sum of squares' halves: what comes in is what came out."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    gradients = torch.autograd.grad(out, leaves, [o.detach() for o in out])
    return [x.detach().reshape(inputs[0].shape[0], -1) for x in (*out, *gradients)]


def large(check: Check, dry: bool) -> dict[str, Any]:
    name, count, call = check
    rows, width, device = (TAIL + 8, 256, "cpu") if dry else (ROWS, WIDTH, "cuda")
    inputs = [torch.randn(rows, width, dtype=torch.bfloat16, device=device) for _ in range(count)]
    tails = [x[-TAIL:].clone() for x in inputs]
    found = [x[-TAIL:].clone() for x in _with_gradients(call, inputs)]
    wrong = sum(not torch.equal(a, b) for a, b in zip(found, _with_gradients(call, tails), strict=True))
    del inputs
    if not dry:
        torch.cuda.empty_cache()
    console.print(f"{name}, {rows * width:,} elements: {'as a small call' if not wrong else f'{wrong} WRONG'}")
    return {"name": name, "elements": rows * width, "wrong": wrong}


P, SEED, SLICE = 0.1, 7 << 40 | 5, 4096


def _kept(first: int, device: str) -> Tensor:
    """The definition's mask of the elements ``first`` to ``first + SLICE``, both multiples of a group."""
    group = torch.arange(first // philox.BLOCK, (first + SLICE) // philox.BLOCK, device=device)[:, None]
    call, zero = group * philox.LANES + torch.arange(philox.LANES, device=device), torch.zeros_like(group)
    key = (torch.tensor(half, device=device) for half in (SEED & 0xFFFFFFFF, SEED >> 32))
    words = philox.philox_words((call & 0xFFFFFFFF, call >> 32, zero, zero), tuple(key))
    threshold, _ = philox.threshold_and_scale(P, torch.device(device))
    return torch.stack([word >= threshold for word in words], 1).view(-1)


def large_dropout(dry: bool) -> dict[str, Any]:
    """Results and gradients with p > 0 at the beginning, in the middle, across 2³¹ elements and at the end."""
    rows, width, device = (TAIL + 8, 256, "cpu") if dry else (ROWS, WIDTH, "cuda")
    x, g = (torch.rand(rows, width, dtype=torch.bfloat16, device=device).add_(1) for _ in range(2))  # nowhere zero
    leaves = (x.requires_grad_(), torch.zeros(width, dtype=x.dtype, device=device).requires_grad_())
    out = ki.fused_bias_dropout_add(x, torch.zeros_like(g), bias=leaves[1], p=P, seed=SEED, backend="triton")
    dx, _ = torch.autograd.grad(out, leaves, g)
    size, wrong = rows * width, 0
    scale = philox.threshold_and_scale(P, x.device)[1].float()[None]  # of one element: the product is float32's
    middle = size // 2 // philox.BLOCK * philox.BLOCK
    for first in {0, middle, max(0, min(2**31 - SLICE // 2, size - SLICE)), size - SLICE}:
        keep = _kept(first, device)
        for found, source in ((out, x), (dx, g)):
            part, whole = (t.detach().view(-1)[first : first + SLICE] for t in (found, source))
            wrong += not torch.equal(part != 0, keep)
            right = torch.where(keep, whole * scale, 0.0)
            wrong += not torch.allclose(
                part.float(), right, rtol=2**-7, atol=0
            )  # the interpreter truncates to bfloat16
    console.print(f"bias + dropout {P} + add, {size:,} elements: {'as defined' if not wrong else f'{wrong} WRONG'}")
    return {"name": f"bias + dropout {P} + add", "elements": size, "wrong": wrong}
