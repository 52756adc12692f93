"""Kernel Index for JAX arrays: the same names, the same contracts, Pallas kernels for TPUs.

Needs the ``tpu`` extra; ``import kernel_index`` never imports it.
"""

from kernel_index.dispatch import Ineligible, Receipt, explain, receipts, strict
from kernel_index.jax.attention import AttentionOutput, attention, attention_with_lse
from kernel_index.jax.mask import AttentionValidity, MaskContract, attention_validity

__all__ = [
    "AttentionOutput",
    "AttentionValidity",
    "Ineligible",
    "MaskContract",
    "Receipt",
    "attention",
    "attention_validity",
    "attention_with_lse",
    "explain",
    "receipts",
    "strict",
]
