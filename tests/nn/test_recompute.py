"""What ``ki.force`` around a forward pass means for the parts of it that backward recomputes."""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import Experts, HybridBlock, SquaredReLUMLP
from kernel_index.nn.recompute import recomputed

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


LAYERS = pytest.mark.parametrize("layer", [mlp, experts, block])


def recomputations(layer, forward, backward):
    """The receipts of the recomputation, with ``force`` blocks around the forward and around the backward pass."""
    call, x = layer(), torch.randn(1, SIZE, 16, requires_grad=True)
    with forward:
        out = call(x)
    with ki.receipts() as log, backward:
        out.sum().backward()
    assert x.grad is not None
    return [(r.ran, r.forced_by) for r in log if r.op == "fused_relu_squared"]


@LAYERS
def test_a_recomputation_after_the_block_runs_what_the_forward_ran(layer):
    assert recomputations(layer, ki.force("reference"), torch.enable_grad()) == [("reference", "ki.force")]


@LAYERS
def test_a_block_around_backward_alone_changes_nothing(layer):
    assert recomputations(layer, torch.enable_grad(), ki.force("reference")) == [("inductor", None)]


@LAYERS
def test_the_blocks_of_backward_are_restored(layer):
    with ki.force("reference", "fused_rope_qk"):
        assert recomputations(layer, ki.force("inductor", "fused_relu_squared"), ki.force("reference")) == [
            ("inductor", "ki.force")
        ]
        with ki.receipts() as log:
            ki.fused_relu_squared(torch.ones(SIZE, SIZE))
    assert [(r.ran, r.forced_by) for r in log] == [("inductor", None)]


def test_each_backward_of_a_kept_graph_recomputes():
    x = torch.randn(SIZE, SIZE, requires_grad=True)
    with ki.force("reference"):
        out = recomputed(ki.fused_relu_squared, x)
    for _ in range(2):
        with ki.receipts() as log:
            out.sum().backward(retain_graph=True)
        assert [r.tried for r in log] == ["reference"]  # it stops as soon as all saved tensors are there
    torch.testing.assert_close(x.grad, 4 * x.detach().relu())


def test_random_numbers_are_drawn_again_only_when_asked():
    x = torch.ones(64, requires_grad=True)
    recomputed(torch.nn.functional.dropout, x, preserve_rng_state=True).sum().backward()
    assert set(x.grad.tolist()) == {0.0, 2.0}


def test_a_trace_recomputes_too():
    x = torch.randn(SIZE, SIZE, requires_grad=True)
    compiled = torch.compile(lambda t: recomputed(ki.fused_relu_squared, t), fullgraph=True, backend="aot_eager")
    with ki.force("reference"), ki.receipts() as log:
        out = compiled(x)
    assert {(r.ran, r.forced_by) for r in log} == {("reference", "ki.force")}
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().relu())
