"""Kernel Index: kernels for training and serving language models.

One contract, several backends, a correct gradient, and a receipt of what really ran.
"""

from kernel_index.dispatch import Explanation, Ineligible, Receipt, explain, receipts, strict
from kernel_index.experts.fused_relu_squared.api import fused_relu_squared

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Ineligible",
    "Receipt",
    "explain",
    "fused_relu_squared",
    "receipts",
    "strict",
]
