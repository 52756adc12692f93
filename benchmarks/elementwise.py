"""Are the memory-bound ops faster than PyTorch, and as fast as torch.compile of the plain formula?

Forward and backward at 4096 × 4096.  Targets: 0.6× the time of eager PyTorch, 1.05× that of torch.compile.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

N = 4096
TARGETS = {"eager": 0.6, "torch.compile": 1.05}


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
    return (
        (q.float() * cos + rotate_half(q.float()) * sin).to(q.dtype),
        (k.float() * cos + rotate_half(k.float()) * sin).to(k.dtype),
    )


def plain_residual_rms_norm(r: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    new = r + d
    x = new.float()
    return new, (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)).to(d.dtype) * w


def plain_bias_dropout_add(x: Tensor, r: Tensor, b: Tensor, p: float) -> Tensor:
    return r + torch.nn.functional.dropout(x + b, p)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def forward_backward(
    function: Callable, inputs: Callable[[], tuple[Tensor, ...]]
) -> Callable[[], Callable[[], object]]:
    """A contender's ``prepare``: leaves of its own, and a call that runs forward and backward."""

    def prepare() -> Callable[[], object]:
        args = inputs()
        leaves = [a for a in args if a.requires_grad]
        with torch.no_grad():
            out = function(*args)
        upstream = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]

        def call() -> object:
            result = function(*args)
            outputs = result if isinstance(result, tuple) else (result,)
            return torch.autograd.grad(outputs, leaves, upstream)

        return call

    return prepare


def questions(dtype: torch.dtype) -> dict[str, tuple[Callable, Callable, Callable]]:
    """Name -> (ours, the plain formula, inputs)."""
    heads, width = 32, 128
    cos, sin = ki.rope_tables(torch.arange(N), width)

    def streams():
        return leaf(N, N, dtype=dtype), leaf(N, N, dtype=dtype), leaf(N, dtype=dtype)

    def pair():
        return leaf(N, N, dtype=dtype), leaf(N, N, dtype=dtype)

    def bda(p: float):
        return (
            lambda x, r, b: ki.fused_bias_dropout_add(x, r, bias=b, p=p),
            lambda x, r, b: plain_bias_dropout_add(x, r, b, p),
            streams,
        )

    return {
        "residual + RMSNorm": (lambda *a: tuple(ki.fused_residual_add_rms_norm(*a)), plain_residual_rms_norm, streams),
        "relu²": (
            ki.fused_relu_squared,
            lambda x: torch.relu(x).square(),
            lambda: (leaf(N, N, dtype=dtype),),
        ),
        "SwiGLU": (ki.fused_gated_activation, lambda gate, up: torch.nn.functional.silu(gate) * up, pair),
        "bias + dropout 0.1 + add": bda(0.1),
        "bias + add (dropout 0)": bda(0.0),
        "RoPE of Q and K": (
            lambda q, k: tuple(ki.fused_rope_qk(q, k, cos, sin)),
            lambda q, k: plain_rope(q, k, cos, sin),
            lambda: (leaf(1, N, heads, width, dtype=dtype), leaf(1, N, heads, width, dtype=dtype)),
        ),
    }


def main(rounds: int = 9) -> list[Comparison]:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (ours, plain, inputs) in questions(dtype).items():
            title = f"{name}, {str(dtype).removeprefix('torch.')}, {N} × {N}, forward + backward"
            calls = (ours, plain, lambda function, inputs=inputs: forward_backward(function, inputs))
            results.append(against_plain(title, *calls, rounds=rounds, targets=TARGETS))
    return results


def against_plain(
    title: str,
    ours: Callable,
    plain: Callable,
    prepare: Callable[[Callable], Callable[[], Callable[[], object]]],
    **options: Any,
) -> Comparison:
    """Ours, the plain formula, and that formula compiled, each as ``prepare`` calls it."""
    contenders = [
        Contender("kernel_index", prepare(ours), ours=True),
        Contender("eager", prepare(plain)),
        Contender("torch.compile", prepare(torch.compile(plain))),
    ]
    found = compare(title, contenders, **options)
    torch._dynamo.reset()
    return found
