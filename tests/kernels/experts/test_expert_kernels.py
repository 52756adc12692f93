"""What the conformance test cannot know about the router and the moves of rows."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton.launch import interpreting

interpreted = pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")


def calls():
    torch.manual_seed(0)
    x, w, rows, weights = (torch.randn(*s) for s in ((3, 4), (5, 4), (6, 4), (3, 2)))
    slots = torch.tensor([[2, 0], [1, 5], [4, 3]])
    return {
        "route": (lambda x, w, b: ki.expert_route(x, w, None, 2, backend=b).weights, (x, w)),
        "softmax": (lambda x, w, b: ki.expert_route(x, w, None, 2, scores="softmax", backend=b).weights, (x, w)),
        "dispatch": (lambda x, w, b: ki.expert_dispatch(x * x, slots, backend=b), (x, w)),
        "combine": (lambda r, w, b: ki.expert_combine(r, w, slots, backend=b), (rows, weights)),
    }


@interpreted
@pytest.mark.parametrize("name", ["route", "softmax", "dispatch", "combine"])
def test_a_gradient_penalty_reaches_the_arguments(name):
    """The upstream gradient is a constant: nothing but the function itself makes the gradient differentiable."""
    function, tensors = calls()[name]
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves, backend)
        grads = torch.autograd.grad(out[:, 0].sum(), leaves, create_graph=True, allow_unused=True)
        penalty = sum((g * g).sum() for g in grads if g is not None)
        found.append([g for g in torch.autograd.grad(penalty, leaves, allow_unused=True) if g is not None])
    assert any(bool(g.any()) for g in found[1])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_slots_are_a_permutation():
    with pytest.raises(ValueError, match="slots must hold each number once, got 1 more than once"):
        ki.expert_dispatch(torch.ones(2, 3), torch.tensor([[0, 1], [3, 1]]))
    with pytest.raises(ValueError, match=r"slots must be in \[0, 4\), got 4"):
        ki.expert_combine(torch.ones(4, 3), torch.ones(2, 2), torch.tensor([[0, 4], [3, 1]]))


@interpreted
def test_one_expert_has_the_weight_1():
    for backend in ("triton", "reference"):
        weights = ki.expert_route(torch.randn(4, 8), torch.randn(1, 8), None, 1, backend=backend).weights
        assert torch.equal(weights, torch.ones(4, 1))
