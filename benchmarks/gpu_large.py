"""Tensors of more than 2³¹ elements: the last rows of a call, forward and backward, against a call of those rows alone.

Everything here works by rows, so the last rows do not depend on how many come before them; offsets do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from benchmarks.harness import console

WIDTH = 4096
ROWS = 2**31 // WIDTH + 64
TAIL = 32

Check = tuple[str, int, Callable[..., Any]]


def _relu(x: Tensor) -> Any:
    return ki.fused_relu_squared(x, backend="triton")


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
