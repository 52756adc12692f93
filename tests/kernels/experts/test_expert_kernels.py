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


@interpreted
def test_scores_of_bfloat16_have_the_digits_of_float32():
    """A token of a single 1 has an expert's weight as its logit: two parts of bfloat16 would leave 2⁻¹⁷ of it."""
    weight = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    found = ki.expert_route(torch.eye(16, dtype=torch.bfloat16), weight, None, 1, backend="triton")
    exact = weight.double().T.sigmoid().amax(-1, keepdim=True)
    torch.testing.assert_close(found.weights.double(), exact, rtol=2e-7, atol=0)


@interpreted
def test_a_weight_of_bfloat16_is_multiplied_as_it_is_with_the_bits_of_its_parts():
    """Divided, it was a tile that Triton loaded anew while the tensor cores still read it."""
    x, weight = torch.randn(70, 200).bfloat16(), torch.randn(16, 200).bfloat16()
    one, other = (ki.expert_route(x, w, None, 2, backend="triton") for w in (weight, weight.float()))
    assert torch.equal(one.experts, other.experts)
    assert torch.equal(one.weights, other.weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_token_has_the_same_experts_among_many_and_few():
    weight = 0.05 * torch.randn(16, 512, device="cuda").bfloat16()
    x = torch.randn(20_000, 512, device="cuda").bfloat16()
    expected = ki.expert_route(x, weight.float(), None, 2, backend="triton")
    for rows in (20_000, 1, 4, 100, 200, 1600, 6400) * 5:
        found = ki.expert_route(x[-rows:], weight, None, 2, backend="triton")
        assert torch.equal(found.experts, expected.experts[-rows:])
        assert torch.equal(found.weights, expected.weights[-rows:])


@interpreted
def test_an_infinite_channel_is_no_nan_for_weights_of_few_digits():
    """The parts behind the first one are 0 there, and infinity times 0 is no number."""
    x, weight = torch.ones(2, 16, dtype=torch.bfloat16), torch.full((4, 16), 0.5)
    x[1, 3], weight[2] = float("inf"), 1.0
    for backend in ("triton", "reference"):
        routing = ki.expert_route(x, weight, None, 1, backend=backend)
        assert routing.weights[1] == 1
        assert routing.experts[0] == 2


@interpreted
@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_gradients_of_bfloat16_have_the_digits_of_float32(scores):
    """The weight's as sums of float32, and those of x but for their own rounding: two parts of bfloat16 keep 2⁻¹⁶."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(150, 130, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(20, 130, generator=g) / 130**0.5).requires_grad_()
    upstream = torch.randn(150, 3, generator=g)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    ours = ki.expert_route(x, weight, None, 3, scores=scores, backend="triton")
    exact = ki.expert_route(*wide, None, 3, scores=scores, backend="reference")
    assert torch.equal(ours.experts, exact.experts)
    torch.testing.assert_close(ours.weights.double(), exact.weights, rtol=2e-6, atol=0)
    d_x, d_weight = torch.autograd.grad(ours.weights, (x, weight), upstream)
    dx_exact, dw_exact = torch.autograd.grad(exact.weights, wide, upstream.double())
    z = wide[0].detach() @ wide[1].detach().T
    (dz,) = torch.autograd.grad(of_scores(z.requires_grad_(), exact.experts, scores), z, upstream.double())
    of_weight, of_x = dz.abs().T @ wide[0].detach().abs(), dz.abs() @ wide[1].detach().abs()  # sums of |terms|
    assert ((d_weight.double() - dw_exact).abs() <= 2e-6 * of_weight).all()
    assert ((d_x.double() - dx_exact).abs() <= 2**-8 * dx_exact.abs() + 2**-15 * of_x).all()


def of_scores(z, experts, scores):
    found = (z.sigmoid() if scores == "sigmoid" else z.softmax(-1)).gather(-1, experts)
    return found / found.sum(-1, keepdim=True)
