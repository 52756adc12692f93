"""What ``ki.force`` around the forward pass of a layer means for the part of it that backward recomputes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.kernels.experts.grouped_product import torch_op
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
    with ki.force("reference", "fused_relu_squared"):  # of all ops, expert_mlp would be the reference, which keeps all
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


def assert_nothing_is_forced():
    with ki.receipts() as log:
        ki.fused_relu_squared(torch.ones(3))
    assert log[0].forced_by is None


def test_backward_may_run_twice_and_leaves_no_force_behind():
    call, x = mlp(), torch.randn(1, 5, 16, requires_grad=True)
    with ki.force("reference"):
        out = call(x).sum()
    grads = [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert_nothing_is_forced()


def test_a_failed_recomputation_leaves_no_force_behind():
    calls = []

    def fails_the_second_time(x):
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("the second time")
        return ki.fused_relu_squared(x)

    x = torch.ones(2, requires_grad=True)
    with ki.force("reference"):
        out = checkpoint(fails_the_second_time, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="the second time"):
        out.backward()
    assert_nothing_is_forced()


def test_the_op_in_which_a_recomputation_stops_has_run():
    """A checkpoint ends its recomputation by an exception inside the last op that it needs: that is no failure."""
    call, x = experts(), torch.randn(1, 5, 16, requires_grad=True)
    out = call(x).sum()
    with ki.receipts() as log:
        out.backward()
    assert [(r.op, r.error) for r in log] == [("fused_relu_squared", None), ("grouped_product", None)]
    assert log[-1].ran == "grouped_mm"


class Launches(TorchDispatchMode):
    """The names of our registered operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "kernel_index":
            self.names.add(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [mlp, experts, block, nested_block])
def test_a_layer_under_the_reference_runs_no_operator_of_ours(layer):
    call, x = layer(), torch.randn(1, SIZE, 16, requires_grad=True)
    with Launches() as launches:
        with ki.force("reference"):
            out = call(x)
        out.square().sum().backward()
    assert launches.names == set()


def test_experts_under_the_reference_are_a_single_graph():
    call, x = experts(), torch.randn(1, 5, 16)
    with ki.force("reference"):
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_a_recomputation_makes_no_product_twice(monkeypatch):
    """Two products forward and the four of their gradients: the one behind the activation is not made again."""
    made, grouped_mm = [], torch_op.grouped_mm
    monkeypatch.setattr(torch_op, "grouped_mm", lambda *a, **k: (made.append(1), grouped_mm(*a, **k))[1])
    call, x = experts(), torch.randn(1, 5, 16, requires_grad=True)
    out = call(x).sum()
    assert len(made) == 2
    out.backward(retain_graph=True)
    assert len(made) == 6
    out.backward()
    assert len(made) == 10


def test_a_recomputed_block_keeps_what_its_layer_would_recompute():
    block = HybridBlock(16, mlp=Experts(16, 24, experts=4, topk=2, shared=8))
    layers = block.mlp, block.mlp.shared
    assert [m.recompute for m in layers] == [True, True]
    block.recompute = True
    assert [m.recompute for m in layers] == [False, False]
    block.recompute = False
    assert [m.recompute for m in layers] == [True, True]


def test_a_layer_that_the_user_switched_off_stays_off():
    block = HybridBlock(16, mlp=SquaredReLUMLP(16, SIZE))
    block.mlp.recompute = False
    for block.recompute in (False, True, False):
        assert not block.mlp.recompute
    block.mlp = SquaredReLUMLP(16, SIZE)
    block.recompute = True
    assert not block.mlp.recompute, "a layer that came later recomputes in the block alone"
