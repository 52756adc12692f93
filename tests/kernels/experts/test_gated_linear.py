"""The activation and the linear layer behind it as one step, which does not keep the activation."""

import pytest
import torch
from torch.nn import functional as F

import kernel_index as ki
from kernel_index.core.triton.launch import interpreting
from kernel_index.kernels.experts.fused_gated_activation import torch_op
from kernel_index.kernels.experts.fused_gated_activation.contract import KINDS

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")


def inputs(bias, dtype=torch.float32):
    make = torch.Generator().manual_seed(3)
    sizes = ((2, 5, 24), (2, 5, 24), (7, 24), *([(7,)] if bias else []))
    return [torch.randn(size, generator=make).to(dtype).requires_grad_() for size in sizes]


def fused(gate, up, weight, bias=None, kind="silu"):
    return ki.fused_gated_activation(gate, up, kind=kind, linear=(weight, bias), backend="triton")


def plain(gate, up, weight, bias=None, kind="silu"):
    return F.linear(ki.fused_gated_activation(gate, up, kind=kind, backend="reference"), weight, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_values_and_gradients_are_those_of_both_steps(kind, bias, frozen):
    leaves = inputs(bias)
    if frozen is not None:
        leaves[frozen].requires_grad_(False)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    found, wanted = fused(*leaves, kind=kind), plain(*exact, kind=kind)
    g = torch.linspace(-1, 1, found.numel()).view(found.shape)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found, [x for x in leaves if x.requires_grad], g)
    theirs = torch.autograd.grad(wanted, [x for x in exact if x.requires_grad], g.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_activation_is_not_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gate, up, weight = inputs(bias=False)
        fused(gate, up, weight)
    assert sorted(kept) == sorted(t.data_ptr() for t in (gate, up, weight))


def test_a_frozen_linear_layer_makes_no_activation_again(monkeypatch):
    """As where adapters are trained: a weight without a gradient needs it in no pass."""
    gate, up, weight, bias = inputs(bias=True)
    found = fused(gate, up, weight.requires_grad_(False), bias)
    monkeypatch.setattr(torch_op, "_all_op", None)
    found.sum().backward()
    assert gate.grad is not None
    assert up.grad is not None
    assert bias.grad is not None


def test_a_linear_layer_that_learns_alone_multiplies_once(monkeypatch):
    gate, up, weight = inputs(bias=False)
    found = fused(gate.requires_grad_(False), up.requires_grad_(False), weight)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a) or mm(*a, **k))
    (d_weight,) = torch.autograd.grad(found.sum(), weight)
    monkeypatch.undo()
    assert len(products) == 1
    activation = ki.fused_gated_activation(gate, up, backend="reference").flatten(0, 1)
    torch.testing.assert_close(d_weight, activation.sum(0).expand_as(weight))


def test_double_backward_is_that_of_the_formula():
    leaves = inputs(bias=True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    seconds = []
    for y, of in ((fused(*leaves), leaves), (plain(*exact), exact)):
        first = torch.autograd.grad(y.square().sum(), of, create_graph=True)
        seconds.append(torch.autograd.grad(sum(d.square().sum() for d in first), of))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_without_a_gpu_it_is_both_steps():
    leaves = inputs(bias=True)
    with ki.receipts() as log:
        found = ki.fused_gated_activation(*leaves[:2], linear=tuple(leaves[2:]))
    assert [r.op for r in log] == ["fused_gated_activation"]
    torch.testing.assert_close(found, plain(*leaves))
    with torch.autocast("cpu", torch.bfloat16):
        low = ki.fused_gated_activation(*(x.bfloat16() for x in leaves[:2]), linear=tuple(leaves[2:]))
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (torch.ones(7, 24), TypeError, "linear must be a pair of weight and bias, got Tensor"),
        ((torch.ones(7, 23), None), ValueError, r"linear\[0\] must be \[O, F\] with gate's last dimension F"),
        ((torch.ones(7, 24), torch.ones(6)), ValueError, r"linear\[1\] must"),
        ((torch.ones(7, 24).long(), None), TypeError, r"linear\[0\] must"),
    ],
)
def test_a_linear_layer_that_does_not_fit_is_refused(linear, error, message):
    gate, up, _ = inputs(bias=False)
    with pytest.raises(error, match=message):
        ki.fused_gated_activation(gate, up, linear=linear)
