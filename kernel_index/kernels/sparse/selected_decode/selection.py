"""The first steps of every backend of ``selected_decode``: write the new tokens, drop repeated blocks."""

import torch
from torch import Tensor

from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall


def write_new_tokens(call: SelectedDecodeCall) -> None:
    if call.k is not None and call.v is not None and not call.cache.written:
        with torch.no_grad():
            call.cache.write(call.k, call.v)


def distinct(indices: Tensor) -> Tensor:
    """The blocks of each query in ascending order, int64, repeats replaced by −1.

    Ascending tokens also make the gather read memory forwards.
    """
    ascending = indices.to(torch.int64).sort(-1).values
    later = ascending[..., 1:]
    later.masked_fill_(later == ascending[..., :-1], -1)
    return ascending
