"""The specification: mix the streams, then read the next branch's input from them; each output is rounded once."""

import math

import torch
from torch import Tensor

from kernel_index.core.dtypes import compute_dtype
from kernel_index.kernels.streams.mhc_fused_static.contract import Call


def mix_reference(call: Call) -> tuple[Tensor, ...]:
    """The merged streams if there is a branch_out, and the branch input if there is an h_pre."""
    hidden, branch_out, h_post, h_res, h_pre = call
    dtype = compute_dtype(*call)
    streams = hidden.to(dtype)
    outputs: tuple[Tensor, ...] = ()
    if branch_out is not None and h_post is not None and h_res is not None:
        mixed = _over_tokens(h_res, 2, hidden, dtype) @ streams
        written = _over_tokens(h_post, 1, hidden, dtype).unsqueeze(-1) * branch_out.to(dtype).unsqueeze(-2)
        streams = mixed + written
        outputs = (streams.to(hidden.dtype).contiguous(),)
    if h_pre is not None:
        read = (_over_tokens(h_pre, 1, hidden, dtype).unsqueeze(-1) * streams).sum(-2)
        outputs += (read.to(hidden.dtype).contiguous(),)
    return outputs


def _over_tokens(coefficient: Tensor, rank: int, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient of each batch row gets dimensions of size 1 where hidden has tokens."""
    if coefficient.ndim > rank:
        ones = (1,) * (hidden.ndim - 3)
        coefficient = coefficient.reshape(coefficient.shape[0], *ones, *coefficient.shape[1:])
    return coefficient.to(dtype)


def sinkhorn_reference(logits: Tensor, iters: int, temperature: float, eps: float, eps_in: str) -> Tensor:
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if eps_in == "elements":  # no element is below eps, so the matrix itself is safe
        matrix = scaled.softmax(-1) + eps
        for step in range(2 * iters - 1):
            matrix = matrix / (matrix.sum(-2 if step % 2 == 0 else -1, keepdim=True) + eps)
        return matrix
    for _ in range(iters):
        for dim in (-1, -2):  # rows, then columns
            if not eps:
                scaled = scaled.log_softmax(dim)  # the same in one step
                continue
            total = scaled.logsumexp(dim, keepdim=True)
            scaled = scaled - torch.logaddexp(total, total.new_tensor(math.log(eps)))
    return scaled.exp()
