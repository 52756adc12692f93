"""Kernel Index: kernels for training and serving language models.

One contract, several backends, a correct gradient, and a receipt of what really ran.
"""

import importlib
from typing import TYPE_CHECKING

from kernel_index.core.dispatch import Explanation, Ineligible, Receipt, explain, receipts, strict
from kernel_index.core.force import PUBLIC, force
from kernel_index.core.numerics import numerics
from kernel_index.core.version import __version__ as __version__
from kernel_index.kernels.attention.dense_attention.api import AttentionOutput, attention, attention_with_lse
from kernel_index.kernels.attention.dense_fa4_execute_proof.api import Proof, fa4_execute_proof
from kernel_index.kernels.attention.dense_fa4_execute_proof.request import ProofShape
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.api import fa4_kvcache_decode
from kernel_index.kernels.attention.exact_token_sparse.api import (
    exact_token_attention,
    exact_token_attention_with_lse,
)
from kernel_index.kernels.attention.fused_rope_qk.api import RopeTables, RotatedQK, fused_rope_qk, rope_tables
from kernel_index.kernels.boundary.fused_bias_dropout_add.api import fused_bias_dropout_add
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.api import ResidualAndNormed, fused_residual_add_rms_norm
from kernel_index.kernels.experts.expert_dispatch.api import ExpertPlan, expert_combine, expert_dispatch, expert_plan
from kernel_index.kernels.experts.expert_mlp.api import expert_mlp
from kernel_index.kernels.experts.expert_router.api import Routing, expert_route
from kernel_index.kernels.experts.fused_gated_activation.api import fused_gated_activation
from kernel_index.kernels.experts.fused_relu_squared.api import fused_relu_squared
from kernel_index.kernels.experts.grouped_product.api import grouped_product
from kernel_index.kernels.linear.linear.api import linear
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.api import (
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_with_lse,
    token_log_probs,
    token_stats,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import CrossEntropyOutput, TokenStats
from kernel_index.kernels.mla.fused_mla_projection.api import fused_mla_projection
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.kernels.sparse.clustered_sparse_three_phase.api import (
    clustered_route,
    clustered_sparse_attention,
    clustered_sparse_attention_with_lse,
)
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.kernels.sparse.moba_block_sparse.api import (
    moba_attention,
    moba_attention_with_lse,
    moba_decode,
    moba_route,
    resolve_block_sparse_backend,
)
from kernel_index.kernels.sparse.moba_block_sparse.backend_aliases import BlockSparseBackend
from kernel_index.kernels.sparse.row_gather.api import GatheredPair, gather_rows, gather_rows_pair
from kernel_index.kernels.sparse.selected_decode.api import selected_decode
from kernel_index.kernels.state_space.causal_conv1d.api import causal_conv1d
from kernel_index.kernels.state_space.gated_rms_norm.api import gated_rms_norm
from kernel_index.kernels.state_space.ssd_scan.api import Scanned, ssd_scan
from kernel_index.kernels.streams.mhc_fused_static.api import (
    StreamsAndBranchInput,
    mhc_branch_input,
    mhc_merge,
    mhc_merge_and_branch_input,
    sinkhorn,
)
from kernel_index.kvcache.cache import CacheLayer, ContiguousKVCache
from kernel_index.kvcache.paged import OutOfPages, PagedKVCache
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity
from kernel_index.masks.causal_windowing_predicate.api import WindowingPlan, can_score_tile, causal_windowing_plan
from kernel_index.masks.doc_window_mask.api import doc_window_mask
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.exact_mask_contract_cache.api import exact_mask_key
from kernel_index.masks.exact_mask_contract_cache.cache import MaskKernelCache
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey
from kernel_index.masks.prefix_tree.api import along_paths, pack_tree
from kernel_index.masks.prefix_tree.packing import TreePacking
from kernel_index.routing.hierarchical_block_expansion.api import hierarchical_block_select
from kernel_index.routing.hierarchical_block_expansion.selection import BlockSelection, HierarchyPlan
from kernel_index.routing.importance_router.api import importance_route
from kernel_index.routing.lightning_indexer.api import lightning_indexer
from kernel_index.routing.lightning_indexer.loss import lightning_indexer_loss
from kernel_index.routing.lightning_indexer.selection import TokenSelection
from kernel_index.routing.union_selection_query_mask.api import materialize_query_union_mask, union_selection
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps

__all__ = [
    "AttentionOutput",
    "AttentionValidity",
    "BlockSelection",
    "BlockSparseBackend",
    "CacheLayer",
    "ClusteredSparseConfig",
    "ContiguousKVCache",
    "CrossEntropyOutput",
    "ExactMaskKey",
    "ExpertPlan",
    "Explanation",
    "GatheredPair",
    "HierarchyPlan",
    "Ineligible",
    "MaskContract",
    "MaskKernelCache",
    "OutOfPages",
    "PagedKVCache",
    "Proof",
    "ProofShape",
    "Receipt",
    "ResidualAndNormed",
    "RopeTables",
    "RotatedQK",
    "Routing",
    "Scanned",
    "StreamsAndBranchInput",
    "TokenSelection",
    "TokenStats",
    "TreePacking",
    "UnionMaps",
    "WindowingPlan",
    "along_paths",
    "attention",
    "attention_validity",
    "attention_with_lse",
    "block_sparse_attention",
    "can_score_tile",
    "causal_conv1d",
    "causal_windowing_plan",
    "clustered_route",
    "clustered_sparse_attention",
    "clustered_sparse_attention_with_lse",
    "doc_window_mask",
    "exact_mask_key",
    "exact_token_attention",
    "exact_token_attention_with_lse",
    "expert_combine",
    "expert_dispatch",
    "expert_mlp",
    "expert_plan",
    "expert_route",
    "explain",
    "fa4_execute_proof",
    "fa4_kvcache_decode",
    "force",
    "fused_bias_dropout_add",
    "fused_gated_activation",
    "fused_linear_cross_entropy",
    "fused_linear_cross_entropy_with_lse",
    "fused_mla_projection",
    "fused_relu_squared",
    "fused_residual_add_rms_norm",
    "fused_rope_qk",
    "gated_rms_norm",
    "gather_rows",
    "gather_rows_pair",
    "grouped_product",
    "hierarchical_block_select",
    "importance_route",
    "lightning_indexer",
    "lightning_indexer_loss",
    "linear",
    "materialize_query_union_mask",
    "mhc_branch_input",
    "mhc_merge",
    "mhc_merge_and_branch_input",
    "moba_attention",
    "moba_attention_with_lse",
    "moba_decode",
    "moba_route",
    "numerics",
    "pack_tree",
    "receipts",
    "resolve_block_sparse_backend",
    "rope_tables",
    "selected_decode",
    "sinkhorn",
    "ssd_scan",
    "strict",
    "token_log_probs",
    "token_stats",
    "union_selection",
]


PUBLIC.update({name: value for name in __all__ if callable(value := globals()[name])})

if TYPE_CHECKING:
    from kernel_index import jax as jax
    from kernel_index import nn as nn
    from kernel_index.integrations import transformers as transformers

_LATER = {
    "jax": "kernel_index.jax",
    "nn": "kernel_index.nn",
    "transformers": "kernel_index.integrations.transformers",
}


def __getattr__(name: str) -> object:
    """``ki.transformers``, ``ki.nn`` and ``ki.jax`` are imported when they are first named."""
    if name in _LATER:
        return importlib.import_module(_LATER[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers: the lazy names too."""
    return sorted({*globals(), *_LATER})
