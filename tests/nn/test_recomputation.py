"""What ``ki.force`` around the forward pass of a layer means for the part of it that backward recomputes."""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import Experts, HybridBlock, SquaredReLUMLP

SIZE = 512  # 512 · 512 elements: "auto" would take a compiled region


def mlp():
    module = SquaredReLUMLP(16, SIZE)
    return lambda x: module(x)[0]


def experts():
    module = Experts(16, SIZE, experts=2, topk=1)
    return lambda x: module(x)[0]


def block():
    module = HybridBlock(16, mlp=SquaredReLUMLP(16, SIZE, recompute=False), dropout=0.5)
    module.recompute = True
    return lambda x: module(x, None)[1][0]


def nested_block():
    module = HybridBlock(16, mlp=SquaredReLUMLP(16, SIZE))
    module.recompute = True
    return lambda x: module(x, None)[1][0]


@pytest.mark.parametrize("layer", [mlp, experts, block, nested_block])
@pytest.mark.parametrize("around_backward", [torch.enable_grad, lambda: ki.force("inductor", "fused_relu_squared")])
def test_a_layer_recomputes_with_the_backend_of_its_forward(layer, around_backward):
    """Also under another block around ``backward()``: a backend that saves other tensors would be an error."""
    call, x = layer(), torch.randn(1, SIZE, 16, requires_grad=True)
    with ki.force("reference"):
        out = call(x)
    with ki.receipts() as log, around_backward():
        out.sum().backward()
    recomputed = {(r.tried, r.forced_by) for r in log if r.op == "fused_relu_squared"}
    assert recomputed == {("reference", "ki.force")}
    assert x.grad is not None


@pytest.mark.parametrize("layer", [mlp, experts, block, nested_block])
def test_a_block_around_backward_alone_does_not_change_the_recomputation(layer):
    call, x = layer(), torch.randn(1, SIZE, 16, requires_grad=True)
    out = call(x)
    with ki.receipts() as log, ki.force("reference"):
        out.sum().backward()
    assert {(r.tried, r.forced_by) for r in log if r.op == "fused_relu_squared"} == {("inductor", None)}
