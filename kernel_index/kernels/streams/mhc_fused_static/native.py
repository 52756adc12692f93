"""A few tokens on the CPU in C++: one call instead of ten of PyTorch's."""

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.streams.mhc_fused_static.contract import Call, is_per_row


def mix_native(call: Call) -> tuple[Tensor, ...]:
    hidden = call.hidden.contiguous()
    batch, tokens, _, channels = hidden.shape
    merged = None if call.branch_out is None else torch.empty_like(hidden)
    read = None if call.h_pre is None else hidden.new_empty(batch, tokens, channels)
    branch = hidden if call.branch_out is None else call.branch_out.contiguous()
    coefficients = [c if c is None else native.floats(c) for c in (call.h_post, call.h_res, call.h_pre)]
    low = (t.dtype == torch.bfloat16 for t in (hidden, branch))
    rows = (batch if is_per_row(c, rank) else 1 for c, rank in zip(coefficients, (1, 2, 1), strict=True))
    sizes = (batch, tokens, channels, merged is not None, read is not None, *low, *rows, native.rows_threads(hidden))
    tensors = (hidden, branch, *coefficients, merged, read)
    native.call(native.ROWS, "mix_streams", sizes, (), *(hidden if t is None else t for t in tensors))
    return tuple(t for t in (merged, read) if t is not None)
