"""Kernel Index for JAX arrays: the same names, the same contracts, Pallas kernels for TPUs.

Needs the ``tpu`` extra; ``import kernel_index`` never imports it.
"""

from kernel_index.dispatch import Ineligible, Receipt, explain, receipts, strict
from kernel_index.jax.clustered import ClusteredSparseConfig, clustered_sparse_attention
from kernel_index.jax.interval_attention import AttentionOutput, attention, attention_with_lse
from kernel_index.jax.mask import AttentionValidity, MaskContract, attention_validity
from kernel_index.jax.routing import UnionMaps, union_selection

__all__ = [
    "AttentionOutput",
    "AttentionValidity",
    "ClusteredSparseConfig",
    "Ineligible",
    "MaskContract",
    "Receipt",
    "UnionMaps",
    "attention",
    "attention_validity",
    "attention_with_lse",
    "clustered_sparse_attention",
    "explain",
    "receipts",
    "strict",
    "union_selection",
]
