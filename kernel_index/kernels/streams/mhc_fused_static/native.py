"""A few tokens on the CPU in C++: one call instead of ten of PyTorch's."""

import math
from collections.abc import Sequence

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


def mix_backward(
    d_merged: Tensor | None, d_read: Tensor | None, hidden: Tensor | None, branch_out: Tensor | None,
    h_post: Tensor | None, h_res: Tensor | None, h_pre: Tensor | None, outputs: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Fill d_hidden, d_branch and the products of each token, as far as ``outputs`` has them."""
    like = next(d for d in (d_merged, d_read) if d is not None)
    batch, tokens, channels = like.shape[0], like.shape[1], like.shape[-1]
    coefficients = [c if c is None else native.floats(c) for c in (h_post, h_res, h_pre)]
    rows = [
        len(c) if c is not None and is_per_row(c, rank) else 1 for c, rank in zip(coefficients, (1, 2, 1), strict=True)
    ]
    read = [d if d is None else d.contiguous() for d in (d_merged, d_read, hidden, branch_out)]
    nothing = like.new_empty(0)  # its address is null
    given = [nothing if t is None else t for t in (*read, *coefficients, *outputs)]
    # What is written has the dtype of what was read, which need not have been kept.
    kinds = (given[0], given[1], given[7] if hidden is None else given[2], given[8] if branch_out is None else given[3])
    sizes = (batch, tokens, channels, h_post is not None, *(t.dtype == torch.bfloat16 for t in kinds), *rows)
    native.call(native.ROWS, "mix_streams_backward", (*sizes, native.rows_threads(like)), (), *given)


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
