"""What both backends of ``selected_decode`` begin with: the write, and each block once."""

import torch
from torch import Tensor

from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall


def write_new_tokens(call: SelectedDecodeCall) -> None:
    if call.k is not None and call.v is not None:
        with torch.no_grad():
            call.cache.write(call.k, call.v)


def distinct(indices: Tensor, blocks: int) -> Tensor:
    """The blocks of each query in ascending order, int64; −1 for repeats and for what is out of range.

    Ascending tokens also make the gather read memory forwards.
    """
    ascending = indices.to(torch.int64).sort(-1).values
    repeated = torch.nn.functional.pad(ascending[..., 1:] == ascending[..., :-1], (1, 0))
    return ascending.masked_fill_(repeated | (ascending >= blocks), -1)
