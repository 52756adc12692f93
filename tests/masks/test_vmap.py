"""Per-sample gradients of a packed model: ``vmap`` over the document ids of a contract equals one call for each."""

import pytest
import torch
from torch.func import grad, vmap

import kernel_index as ki

IDS = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 3, 3], [-1, -1, 0, 0, 0, 1]])
ROUTE = {"block_size": 2, "topk": 2}
CONFIG = ki.ClusteredSparseConfig(**ROUTE)
CALLS = {
    "attention": lambda q, k, mask: ki.attention(q, k, k, mask),
    "window": lambda q, k, mask: ki.attention(q, k, k, ki.MaskContract(window=(1, 0), doc_ids=mask.doc_ids)),
    "not causal": lambda q, k, mask: ki.attention(q, k, k, ki.MaskContract(False, doc_ids=mask.doc_ids)),
    "moba": lambda q, k, mask: ki.moba_attention(q, k, k, **ROUTE, mask=mask),
    "clustered": lambda q, k, mask: ki.clustered_sparse_attention(q, k, k, config=CONFIG, mask=mask),
    "exact": lambda q, k, mask: ki.exact_token_attention(q, k, k, torch.arange(6).expand(1, 6, 2, 6), mask=mask),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_document_ids(name):
    torch.manual_seed(0)
    q, k = torch.randn(4, 6, 4, 8), torch.randn(4, 6, 2, 8)

    def loss(w, q, k, ids):
        return CALLS[name]((q * w)[None], k[None], ki.MaskContract(doc_ids=ids[None])).square().sum()

    together = vmap(grad(loss), (None, 0, 0, 0))(torch.ones(8), q, k, IDS)
    single = torch.stack([grad(loss)(torch.ones(8), *one) for one in zip(q, k, IDS, strict=True)])
    torch.testing.assert_close(together, single)
