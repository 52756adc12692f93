"""The entries of the index, by family: only names and prose are written down here."""

import functools
from typing import Any

from kernel_index.index.entry import Entry

FAMILIES = (
    "Attention",
    "Sparse staging",
    "Block boundary",
    "Experts and activations",
    "Multi-stream fusion",
    "MLA",
    "Loss",
    "State space",
    "Linear layers",
)


def entry(name: str, family: str, folder: str, functions: str, purpose: str, used_by: str, **more: Any) -> Entry:
    """An ``Entry`` with its lists written as words."""
    return Entry(name, family, folder, tuple(functions.split()), purpose, tuple(used_by.split()), **more)


seed_entry = functools.partial(entry, seed=True)


def find(name: str) -> Entry | None:
    """The entry of this name, or the one that a public function belongs to: ``attention`` or ``ki.attention``."""
    name = name.removeprefix("kernel_index.").removeprefix("ki.")
    return next((e for e in ENTRIES if name == e.name), None) or next((e for e in ENTRIES if name in e.functions), None)


ENTRIES = (
    seed_entry(
        "attention_validity_prefix",
        "Attention",
        "masks/attention_validity_prefix",
        "attention_validity",
        "Bring counts of valid tokens or slots into one form that keeps absent, zero and present apart.",
        "masks.doc_window_mask.doc_window_mask lm.LanguageModel",
    ),
    seed_entry(
        "causal_windowing_predicate",
        "Attention",
        "masks/causal_windowing_predicate",
        "can_score_tile causal_windowing_plan",
        "Tell a scoring loop which key tiles are wholly in the future, so that it stops there.",
        "kernels.sparse.clustered_sparse_three_phase.clustered_sparse_attention jax.clustered_sparse_attention",
    ),
    seed_entry(
        "doc_window_mask",
        "Attention",
        "masks/doc_window_mask",
        "doc_window_mask MaskContract pack_tree along_paths",
        "Say once which keys each query may attend to: causality, documents, prefix trees, valid prefixes, windows.",
        "nn.Attention nn.SparseAttention",
    ),
    seed_entry(
        "exact_token_sparse_telemetry",
        "Attention",
        "kernels/attention/exact_token_sparse",
        "exact_token_attention exact_token_attention_with_lse lightning_indexer lightning_indexer_loss",
        "Attend to exactly the selected tokens, and record whether a call stayed sparse or became dense.",
        "nn.SparseAttention",
    ),
    seed_entry(
        "fused_rope_qk",
        "Attention",
        "kernels/attention/fused_rope_qk",
        "fused_rope_qk rope_tables",
        "Rotate queries and keys by position in one launch, under one shape check.",
        "nn.Attention nn.TransformerBlock nn.HybridBlock",
    ),
    seed_entry(
        "dense_fa4_execute_proof",
        "Attention",
        "kernels/attention/dense_fa4_execute_proof",
        "fa4_execute_proof",
        "Run FlashAttention-4 for real, check its numbers and gradients, and keep a receipt that can be verified.",
        "proofs.fa4",
    ),
    seed_entry(
        "dense_fa4_kvcache_decode",
        "Attention",
        "kernels/attention/dense_fa4_kvcache_decode",
        "fa4_kvcache_decode",
        "Append new keys and values to a contiguous or paged cache and attend over what it then holds.",
        "nn.Attention",
    ),
    seed_entry(
        "hierarchical_block_expansion",
        "Sparse staging",
        "routing/hierarchical_block_expansion",
        "hierarchical_block_select",
        "Select key blocks in two steps: the best coarse groups first, then the best of their children.",
        "nn.SparseAttention",
    ),
    seed_entry(
        "triton_row_gather",
        "Sparse staging",
        "kernels/sparse/row_gather",
        "gather_rows",
        "Gather rows of one (N, H, D) tensor by index.",
        "nn.SparseAttention",
    ),
    seed_entry(
        "triton_row_gather_pair",
        "Sparse staging",
        "kernels/sparse/row_gather",
        "gather_rows_pair",
        "Gather the same rows of keys and of values with one check and one launch.",
        "kernels.sparse.selected_decode.selected_decode",
    ),
    seed_entry(
        "moba_block_sparse_decode",
        "Sparse staging",
        "kernels/sparse/moba_block_sparse",
        "moba_attention moba_attention_with_lse moba_decode moba_route resolve_block_sparse_backend",
        "Route each query to a few key blocks, in training and in decoding, and say which backend ran.",
        "nn.SparseAttention",
    ),
    seed_entry(
        "union_selection_query_mask",
        "Sparse staging",
        "routing/union_selection_query_mask",
        "union_selection materialize_query_union_mask",
        "Join the blocks that a tile's queries selected, and keep for each query which of them it selected itself.",
        "kernels.sparse.clustered_sparse_three_phase.clustered_sparse_attention jax.clustered_sparse_attention",
    ),
    seed_entry(
        "clustered_sparse_three_phase",
        "Sparse staging",
        "kernels/sparse/clustered_sparse_three_phase",
        "clustered_sparse_attention clustered_sparse_attention_with_lse clustered_route",
        "Score blocks, join the selections of neighbouring queries, attend over the union: three separate phases.",
        "nn.SparseAttention jax.clustered_sparse_attention",
        jax="jax.clustered_backends",
    ),
    seed_entry(
        "exact_mask_contract_cache",
        "Sparse staging",
        "masks/exact_mask_contract_cache",
        "exact_mask_key",
        "Key compiled mask kernels by what is static in a mask, never by the tensors of a batch.",
        "kernels.sparse.clustered_sparse_three_phase.clustered_sparse_attention jax.clustered_sparse_attention",
    ),
    seed_entry(
        "fused_bias_dropout_add",
        "Block boundary",
        "kernels/boundary/fused_bias_dropout_add",
        "fused_bias_dropout_add",
        "Add the bias, drop out and add the residual in one pass, with a mask that replays from its seed.",
        "nn.TransformerBlock nn.HybridBlock",
    ),
    seed_entry(
        "fused_residual_add_rms_norm",
        "Block boundary",
        "kernels/boundary/fused_residual_add_rms_norm",
        "fused_residual_add_rms_norm",
        "Update the residual stream and normalise it in one pass over memory.",
        "nn.TransformerBlock nn.HybridBlock",
    ),
    seed_entry(
        "fused_relu_squared",
        "Experts and activations",
        "kernels/experts/fused_relu_squared",
        "fused_relu_squared",
        "Squared ReLU with its gradient, each in one pass over memory.",
        "nn.SquaredReLUMLP nn.Experts",
    ),
    seed_entry(
        "mhc_fused_static",
        "Multi-stream fusion",
        "kernels/streams/mhc_fused_static",
        "mhc_branch_input mhc_merge mhc_merge_and_branch_input sinkhorn",
        "Mix four residual streams with static coefficients, a merge fused with the next layer's input.",
        "nn.HyperConnections",
    ),
    seed_entry(
        "fused_mla_projection",
        "MLA",
        "kernels/mla/fused_mla_projection",
        "fused_mla_projection",
        "Project down, normalise and project up, recomputing the latent in backward instead of keeping it.",
        "nn.MLA",
    ),
    seed_entry(
        "fused_linear_cross_entropy_chunked",
        "Loss",
        "kernels/loss/fused_linear_cross_entropy_chunked",
        "fused_linear_cross_entropy fused_linear_cross_entropy_with_lse token_log_probs token_stats",
        "Classify over a large vocabulary without ever holding more than a chunk of the logits.",
        "lm.LanguageModel",
    ),
    entry(
        "dense_attention",
        "Attention",
        "kernels/attention/dense_attention",
        "attention attention_with_lse",
        "Attend under one mask contract: dense, causal, packed documents, windows and padding.",
        "nn.Attention",
        jax="jax.attention_backends",
    ),
    entry(
        "selected_decode",
        "Sparse staging",
        "kernels/sparse/selected_decode",
        "selected_decode",
        "Decode over exactly the cached tokens or blocks that a router selected for each query.",
        "nn.SparseAttention",
    ),
    entry(
        "block_sparse_attention",
        "Sparse staging",
        "kernels/sparse/block_sparse_attention",
        "block_sparse_attention",
        "Attend to the key blocks that were selected for each query, however they were selected.",
        "nn.SparseAttention",
    ),
    entry(
        "importance_router",
        "Sparse staging",
        "routing/importance_router",
        "importance_route",
        "Select the blocks that attention over compressed blocks weighs most, summed over the heads of a KV head.",
        "nn.SparseAttention",
    ),
    entry(
        "expert_router",
        "Experts and activations",
        "kernels/experts/expert_router",
        "expert_route",
        "Score every expert for every token in float32, and select the best with their weights, in one launch.",
        "nn.Experts",
    ),
    entry(
        "expert_dispatch",
        "Experts and activations",
        "kernels/experts/expert_dispatch",
        "expert_plan expert_dispatch expert_combine",
        "Bring tokens into the order of their experts by a counting sort, and add up what the experts made of them.",
        "nn.Experts",
    ),
    entry(
        "expert_mlp",
        "Experts and activations",
        "kernels/experts/expert_mlp",
        "expert_mlp",
        "Compute the experts behind their router, with one pass between the products of the backward direction.",
        "nn.Experts",
    ),
    entry(
        "grouped_product",
        "Experts and activations",
        "kernels/experts/grouped_product",
        "grouped_product",
        "Multiply the rows of each expert by that expert's matrix, all experts in one call.",
        "nn.Experts",
    ),
    entry(
        "fused_gated_activation",
        "Experts and activations",
        "kernels/experts/fused_gated_activation",
        "fused_gated_activation",
        "Apply a gated MLP's activation, SwiGLU or GEGLU for example, in one pass without keeping its result.",
        "nn.SwiGLUMLP nn.Experts",
    ),
    entry(
        "ssd_scan",
        "State space",
        "kernels/state_space/ssd_scan",
        "ssd_scan",
        "Run the recurrence of Mamba-2 over packed documents, in chunks of matrix products.",
        "nn.Mamba2",
    ),
    entry(
        "causal_conv1d",
        "State space",
        "kernels/state_space/causal_conv1d",
        "causal_conv1d",
        "Convolve each channel with its last few inputs of the same document, and apply SiLU, in one pass.",
        "nn.Mamba2",
    ),
    entry(
        "gated_rms_norm",
        "State space",
        "kernels/state_space/gated_rms_norm",
        "gated_rms_norm",
        "Gate the output of a scan and normalise it in one pass over memory.",
        "nn.Mamba2",
    ),
    entry(
        "linear",
        "Linear layers",
        "kernels/linear/linear",
        "linear",
        "Multiply by a weight so that each row's bits depend on that row alone, in training and in decoding.",
        "nn.Linear",
    ),
)
"""The 20 entries of the seed in its own order; after them the other public functions, and what `make new` adds."""
