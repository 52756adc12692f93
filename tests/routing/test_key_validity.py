"""Counts of keys alone have no routed form: every function that selects blocks says so, and takes counts of rows."""

import pytest
import torch

import kernel_index as ki

T, BLOCK = 24, 4
KEYS_ALONE = ki.MaskContract(key_validity=ki.attention_validity(valid_token_counts=[9]))
ROWS = ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[9]))
q, k = torch.randn(1, T, 4, 8), torch.randn(1, T, 2, 8)
CALLS = {
    "moba_attention": lambda mask: ki.moba_attention(q, k, k, block_size=BLOCK, topk=2, mask=mask),
    "clustered_sparse_attention": lambda mask: ki.clustered_sparse_attention(
        q, k, k, config=ki.ClusteredSparseConfig(block_size=BLOCK, topk=2), mask=mask
    ),
    "moba_route": lambda mask: ki.moba_route(q, k, block_size=BLOCK, topk=2, mask=mask),
    "hierarchical_block_select": lambda mask: ki.hierarchical_block_select(
        q, k[:, : T // BLOCK], block_size=BLOCK, final_topk=2, coarse_ratio=2, coarse_topc=1, mask=mask, kv_len=T
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts_of_keys_alone_are_refused_by_name(name):
    CALLS[name](ROWS)
    with pytest.raises(ValueError, match="key_validity must be left out where blocks are routed"):
        CALLS[name](KEYS_ALONE)
