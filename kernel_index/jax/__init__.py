"""Kernel Index for JAX arrays: the same names, the same contracts, Pallas kernels for TPUs.

Needs the ``tpu`` extra; ``import kernel_index`` never imports it.
"""

from kernel_index.dispatch import Ineligible, Receipt, explain, receipts, strict
from kernel_index.jax.clustered import clustered_route, clustered_sparse_attention, clustered_sparse_attention_with_lse
from kernel_index.jax.interval_attention import AttentionOutput, attention, attention_with_lse
from kernel_index.jax.mask import AttentionValidity, MaskContract, attention_validity
from kernel_index.jax.routing import UnionMaps, union_selection
from kernel_index.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig

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
    "clustered_route",
    "clustered_sparse_attention",
    "clustered_sparse_attention_with_lse",
    "explain",
    "receipts",
    "strict",
    "union_selection",
]
