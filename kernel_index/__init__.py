"""Kernel Index: kernels for training and serving language models.

One contract, several backends, a correct gradient, and a receipt of what really ran.
"""

from kernel_index.attention.fused_rope_qk.api import RopeTables, RotatedQK, fused_rope_qk, rope_tables
from kernel_index.boundary.fused_bias_dropout_add.api import fused_bias_dropout_add
from kernel_index.boundary.fused_residual_add_rms_norm.api import ResidualAndNormed, fused_residual_add_rms_norm
from kernel_index.dispatch import Explanation, Ineligible, Receipt, explain, receipts, strict
from kernel_index.experts.fused_relu_squared.api import fused_relu_squared

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Ineligible",
    "Receipt",
    "ResidualAndNormed",
    "RopeTables",
    "RotatedQK",
    "explain",
    "fused_bias_dropout_add",
    "fused_relu_squared",
    "fused_residual_add_rms_norm",
    "fused_rope_qk",
    "receipts",
    "rope_tables",
    "strict",
]
