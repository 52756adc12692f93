"""The activations and their derivatives in plain PyTorch, in the dtype of their argument.

``f`` has the functions that are not correctly rounded: PyTorch's, or those of ``core.stable``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.stable import PYTORCH


def activation(x: Tensor, kind: str, f: Any = PYTORCH) -> Tensor:
    if kind == "silu":
        return x * f.sigmoid(x)
    if kind == "gelu":
        return x * (0.5 * (1.0 + f.erf(x * math.sqrt(0.5))))
    if kind == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2·z), which loses no digits where tanh(z) is near -1
        return x * f.sigmoid(math.sqrt(8.0 / math.pi) * (x + 0.044715 * x * x * x))
    r = torch.relu(x)
    return r if kind == "relu" else r * r


def slope(x: Tensor, kind: str, f: Any = PYTORCH) -> Tensor | float:
    """The derivative of act at x; of relu and relu2 where x > 0."""
    if kind == "silu":
        s = f.sigmoid(x)
        return s + x * s * (1.0 - s)
    if kind == "gelu":
        density = f.exp(-0.5 * x * x) * math.sqrt(0.5 / math.pi)
        return 0.5 * (1.0 + f.erf(x * math.sqrt(0.5))) + x * density
    if kind == "gelu_tanh":
        factor = math.sqrt(8.0 / math.pi)
        s = f.sigmoid(factor * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * factor * (1.0 + 3.0 * 0.044715 * x * x)
    return 1.0 if kind == "relu" else 2.0 * x
