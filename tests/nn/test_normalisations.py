"""A normalisation that is constant in a legal case stops learning there without an error.

The router of ``nn.Experts`` was such a case: with one expert for each token its weight was score / score.  The other
normalisations of the tree were looked at for the smallest size that they accept:

- ``nn.Experts(experts=1)``: there is nothing to choose, and the layer is the dense one.  Constant by definition.
- ``ki.sinkhorn`` of one stream: the only doubly stochastic 1 × 1 matrix is 1.  Constant by definition.
- Softmax over one key, in attention of every kind: the output is v.  Constant in q and k by definition.
- ``ki.lightning_indexer_loss`` with one selected token: a divergence between two distributions over one token is 0.
  Constant by definition; its docstring says it.
- Cross-entropy with one class, smoothed or not: the only probability is 1.  Constant by definition.
- RMS norm and the MLA projection's norm over one channel: x / |x|, up to eps.  Constant by definition.
- Sampling with one candidate: nothing to draw.  No gradient is taken.
- The routers of blocks and the hierarchical search have no normalisation: they compare scores.
"""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import Experts


def router_gradient(scores, topk):
    torch.manual_seed(0)
    module = Experts(16, 16, experts=4, topk=topk, scores=scores)
    module(torch.randn(2, 8, 16))[0].square().sum().backward()
    return module.router.weight.grad.abs().max().item()


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_a_router_of_one_expert_per_token_learns(scores):
    assert router_gradient(scores, 1) > 0.1 * router_gradient(scores, 2)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_a_single_expert_has_weight_one(scores):
    router = Experts(16, 16, experts=1, topk=1, scores=scores).router
    assert torch.equal(router(torch.randn(5, 16)).weights, torch.ones(5, 1))


def test_constant_by_definition():
    assert torch.equal(ki.sinkhorn(torch.randn(3, 1, 1), 2, eps=0.0), torch.ones(3, 1, 1))
    one_class = ki.fused_linear_cross_entropy(
        torch.randn(4, 8), torch.randn(1, 8), torch.zeros(4, dtype=torch.int64), label_smoothing=0.1
    )
    assert one_class == 0
    selected = ki.lightning_indexer(torch.randn(1, 5, 2, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 2), topk=1)
    assert ki.lightning_indexer_loss(selected, torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)) == 0
