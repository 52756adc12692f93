"""What the conformance test cannot know about the experts: what is kept, and what a checkpoint repeats."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.core.triton.launch import interpreting
from kernel_index.kernels.experts.expert_mlp import torch_op
from kernel_index.kernels.experts.expert_mlp.cases import call

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")
NAMES = ("x", "up", "down", "weights")


def given(gated, **more):
    kwargs = call(Maker(torch.float32), 10, 2, 16, 8, 3, gated=gated, **more)
    for name in NAMES:
        kwargs[name].requires_grad_()
    return kwargs


@pytest.mark.parametrize("gated", [False, True])
def test_rows_and_activation_are_not_kept(gated):
    kwargs, shapes = given(gated), set()

    def pack(t):
        shapes.add(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ki.expert_mlp(**kwargs, backend="triton")
    pairs, width = 20, 16 if gated else 8
    assert (pairs, width) in shapes, "the results of the first product"
    assert not shapes & {(pairs, 16), (pairs, 8)} - {(pairs, width)}, "what the products read"


def test_a_checkpoint_does_not_repeat_the_second_product(monkeypatch):
    kwargs, products = given(True), []
    grouped = torch_op.grouped

    def counted(*arguments):
        products.append(arguments)
        return grouped(*arguments)

    monkeypatch.setattr(torch_op, "grouped", counted)
    tensors = [kwargs.pop(name) for name in NAMES]

    def layer(*tensors):
        return ki.expert_mlp(**kwargs, **dict(zip(NAMES, tensors, strict=True)), backend="triton")

    out = checkpoint(layer, *tensors, use_reentrant=False)
    assert len(products) == 2
    torch.autograd.grad(out.sum(), tensors)
    assert len(products) == 2 + 1 + 4, "the first product again, and four of the gradients"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("wanted", [("x",), ("up",), ("down",), ("weights",), ("base",), ("down", "weights")])
def test_what_is_frozen_has_no_gradient(gated, wanted):
    kwargs = given(gated, base=torch.ones(10, 16))
    for name in (*NAMES, "base"):
        kwargs[name] = kwargs[name].detach().requires_grad_(name in wanted)
    found = []
    for backend in ("triton", "reference"):
        out = ki.expert_mlp(**kwargs, backend=backend)
        found.append(torch.autograd.grad(out.square().sum(), [kwargs[name] for name in wanted]))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    kwargs = given(True)
    with pytest.raises(ValueError, match=r"up must be \[E, F, C\] with the E, C and F of down, \(3, 8, 16\)"):
        ki.expert_mlp(**kwargs | {"activation": "relu2"})
    with pytest.raises(ValueError, match="activation must be one of 'relu2', 'swiglu', got 'gelu'"):
        ki.expert_mlp(**kwargs | {"activation": "gelu"})
    with pytest.raises(ValueError, match=r"slots must be \[N, k\] with the 10 rows of x"):
        ki.expert_mlp(**kwargs | {"slots": kwargs["slots"][:9]})
