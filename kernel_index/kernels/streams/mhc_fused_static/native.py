"""A few tokens on the CPU in C++: one call instead of ten of PyTorch's."""

import math

import torch
from torch import Tensor

from kernel_index.core import native, stable
from kernel_index.kernels.streams.mhc_fused_static.contract import Call, is_per_row


def mix_native(call: Call) -> tuple[Tensor, ...]:
    return mix(*call)


def mix(
    hidden: Tensor, branch_out: Tensor | None, h_post: Tensor | None, h_res: Tensor | None, h_pre: Tensor | None
) -> tuple[Tensor, ...]:
    call = Call(hidden, branch_out, h_post, h_res, h_pre)
    hidden = call.hidden.contiguous()
    batch, tokens, _, channels = hidden.shape
    merged = None if call.branch_out is None else torch.empty_like(hidden)
    read = None if call.h_pre is None else hidden.new_empty(batch, tokens, channels)
    branch = hidden if call.branch_out is None else call.branch_out.contiguous()
    coefficients = [c if c is None else native.floats(c) for c in (call.h_post, call.h_res, call.h_pre)]
    low = (t.dtype == torch.bfloat16 for t in (hidden, branch))
    rows = (
        len(c) if c is not None and is_per_row(c, rank) else 1 for c, rank in zip(coefficients, (1, 2, 1), strict=True)
    )
    sizes = (batch, tokens, channels, merged is not None, read is not None, *low, *rows, native.rows_threads(hidden))
    tensors = (hidden, branch, *coefficients, merged, read)
    native.call(native.ROWS, "mix_streams", sizes, (), *(hidden if t is None else t for t in tensors))
    return tuple(t for t in (merged, read) if t is not None)


def sinkhorn_native(logits: Tensor, iters: int, temperature: float, eps: float, eps_in: str) -> Tensor:
    """By functions and sums whose bits do not depend on compilation; eps is one more term of each sum."""
    scaled = logits.to(torch.float32) / temperature
    least = math.log(eps) if eps else -math.inf
    for _ in range(iters):
        for dim in (-1, -2):  # rows, then columns
            largest = scaled.detach().amax(dim, keepdim=True).clamp_min(least)
            total = stable.sum_of(stable.with_gradient("exp", scaled - largest), dim).unsqueeze(dim)
            scaled = scaled - (largest + stable.with_gradient("log", total + stable.exp(least - largest)))
    return stable.with_gradient("exp", scaled)
