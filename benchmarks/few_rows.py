"""What does an elementwise op cost for the one token of a decoding step?

Under ``inference_mode``, one row of 8 heads of 64, of 512 and of 2048 channels: the native kernel against the formula
in PyTorch's calls, and against that formula under ``torch.compile``.  A timed call is 200 of them.

Targets, as times of ours ÷ theirs: 0.6 and 0.6.  Predicted: PyTorch's calls are ten to thirty of 1 to 2 µs each, a
compiled region checks its guards in 20; ours are one call through ctypes, 5 µs, beside 15 of checks and choice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import kernel_index as ki
from benchmarks.elementwise import against_plain, plain_residual_rms_norm, plain_rope
from benchmarks.harness import Comparison

CALLS = 200
TARGETS = {"eager": 0.6, "torch.compile": 0.6}


def plain_mix(hidden: Tensor, out: Tensor, post: Tensor, res: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    merged = res @ hidden.float() + post[:, None] * out.float()[..., None, :]
    return merged.to(hidden.dtype), (pre[:, None] * merged).sum(-2).to(hidden.dtype)


def questions(dtype: torch.dtype) -> dict[str, tuple[Callable, Callable, tuple[Tensor, ...]]]:
    """Name -> (ours, the plain formula, inputs)."""
    found: dict[str, tuple[Callable, Callable, tuple[Tensor, ...]]] = {}
    heads = torch.randn(2, 1, 1, 8, 64, dtype=dtype)
    found["RoPE of Q and K, 8 heads of 64"] = (
        ki.fused_rope_qk,
        plain_rope,
        (*heads, *ki.rope_tables(torch.arange(1), 64)),
    )
    for width in (512, 2048):
        rows = torch.randn(2, 1, 1, width, dtype=dtype)
        norm = (ki.fused_residual_add_rms_norm, plain_residual_rms_norm, (*rows, torch.ones(width, dtype=dtype)))
        mixing = (torch.randn(1, 1, 4, width, dtype=dtype), rows[0], torch.ones(4), torch.eye(4), torch.ones(4))
        found[f"residual + RMSNorm, {width}"] = norm
        found[f"streams, {width}"] = ki.mhc_merge_and_branch_input, plain_mix, mixing
    return found


def many(function: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], Callable[[], object]]:
    return lambda: lambda: [function(*inputs) for _ in range(CALLS)]


def main(rounds: int = 9) -> list[Comparison]:
    found = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for name, (ours, plain, inputs) in questions(dtype).items():
                title = f"{name}, {str(dtype).removeprefix('torch.')}, {CALLS} calls of one token"
                calls = (ours, plain, lambda function, inputs=inputs: many(function, inputs))
                found.append(against_plain(title, *calls, rounds=rounds, targets=TARGETS))
    return found


if __name__ == "__main__":
    main()
