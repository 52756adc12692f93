"""The specification: relu(x)**2 in at least float32."""

import torch
from torch import Tensor


def relu_squared_reference(x: Tensor) -> Tensor:
    r = torch.relu(x.to(torch.promote_types(x.dtype, torch.float32)))
    return (r * r).to(x.dtype).contiguous()
