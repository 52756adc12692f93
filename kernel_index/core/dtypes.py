"""The dtype that a kernel computes in, from the dtypes of its arguments."""

from typing import Any

import torch
from torch import Tensor


def compute_dtype(*values: Any) -> torch.dtype:
    """Float32, or float64 where an argument is; arguments that are not tensors are ignored."""
    wide = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in values)
    return torch.float64 if wide else torch.float32
