"""The specification: the product in float32 at least, then the bias, then one rounding."""

import torch
from torch import Tensor

from kernel_index.kernels.linear.linear.contract import Call


def linear_reference(call: Call) -> Tensor:
    wide = torch.promote_types(call.x.dtype, torch.float32)
    y = call.x.to(wide) @ call.weight.to(wide).T
    return (y if call.bias is None else y + call.bias.to(wide)).to(call.x.dtype).contiguous()


def linear_torch(call: Call) -> Tensor:
    """PyTorch's own: its kernel may sum a row in another way for another number of rows."""
    return torch.nn.functional.linear(*call).contiguous()
