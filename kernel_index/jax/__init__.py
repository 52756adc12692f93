"""Kernel Index for JAX arrays: the same names, the same contracts, Pallas kernels for TPUs.

Needs the ``tpu`` extra.  ``import kernel_index`` never imports JAX, and this package imports it when a name is first
used, so that the tables of backends can be read without JAX.
"""

import importlib
from typing import TYPE_CHECKING

from kernel_index.core.dispatch import Ineligible, Receipt, explain, receipts, strict
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig

if TYPE_CHECKING:
    from kernel_index.jax.clustered_attention import (
        clustered_route,
        clustered_sparse_attention,
        clustered_sparse_attention_with_lse,
    )
    from kernel_index.jax.interval_attention import AttentionOutput, attention, attention_with_lse
    from kernel_index.jax.mask import MaskContract
    from kernel_index.jax.routing import UnionMaps, union_selection
    from kernel_index.jax.validity import AttentionValidity, attention_validity

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

_HOME = {
    "clustered_attention": ("clustered_route", "clustered_sparse_attention", "clustered_sparse_attention_with_lse"),
    "interval_attention": ("AttentionOutput", "attention", "attention_with_lse"),
    "mask": ("MaskContract",),
    "routing": ("UnionMaps", "union_selection"),
    "validity": ("AttentionValidity", "attention_validity"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"kernel_index.jax.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
