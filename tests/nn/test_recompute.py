"""What backward computes again runs the backends that forward ran, under whatever block of ``ki.force``."""

import contextlib

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import Attention, Experts, HybridBlock, SquaredReLUMLP
from kernel_index.nn.recompute import recomputed


def squared_relu():
    return SquaredReLUMLP(8, 16), (torch.randn(2, 5, 8, requires_grad=True),)


def experts():
    return Experts(8, 16, experts=3, topk=2), (torch.randn(2, 5, 8, requires_grad=True),)


def block():
    module = HybridBlock(16, mixer=Attention(16, 2, 1, 8), mlp=SquaredReLUMLP(16, 32), dropout=0.2)
    module.recompute = True
    branch = torch.randn(1, 6, 16, requires_grad=True), None
    return module, (torch.randn(1, 6, 16), branch, ki.MaskContract(), ki.rope_tables(torch.arange(6), 8))


@pytest.mark.parametrize("make", [squared_relu, experts, block])
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_backward_recomputes_under_the_force_of_forward(make, where):
    module, args = make()
    forward, backward = (where in (name, "both") for name in ("forward", "backward"))
    with ki.receipts() as first, ki.force("reference") if forward else contextlib.nullcontext():
        *_, (out, _) = (module(*args),) if make is not block else module(*args)
    with ki.receipts() as again, ki.force("reference") if backward else contextlib.nullcontext():
        out.square().sum().backward()
    assert again, "something is recomputed"
    assert {r.forced_by for r in first} == {r.forced_by for r in again} == {"ki.force" if forward else None}
    ran = {(r.op, r.ran) for r in first}
    assert {(r.op, r.ran) for r in again} <= ran
    assert not forward or {name for _, name in ran} == {"reference"}


def test_backward_may_run_twice_and_leaves_no_force_behind():
    module, args = squared_relu()
    with ki.force("reference"):
        out = module(*args)[0].sum()
    grads = [torch.autograd.grad(out, args, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    with ki.receipts() as log:
        ki.fused_relu_squared(torch.ones(3))
    assert log[0].forced_by is None


def test_a_failed_recomputation_leaves_no_force_behind():
    calls = []

    def fails_the_second_time(x):
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("the second time")
        return x.square()

    x = torch.ones(2, requires_grad=True)
    with ki.force("reference"):
        out = recomputed(fails_the_second_time, x).sum()
    with pytest.raises(RuntimeError, match="the second time"):
        out.backward()
    with ki.receipts() as log:
        ki.fused_relu_squared(torch.ones(3))
    assert log[0].forced_by is None


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of our registered operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "kernel_index":
            self.names.add(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [squared_relu, experts, block])
def test_the_reference_runs_no_operator_of_ours(make):
    module, args = make()
    with Launches() as launches:
        with ki.force("reference"):
            *_, (out, _) = (module(*args),) if make is not block else module(*args)
        out.square().sum().backward()
    assert launches.names == set()


def test_experts_are_a_single_graph_under_the_reference_too():
    module, (x,) = experts()
    with ki.force("reference"):
        out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0]
        torch.testing.assert_close(out, module(x)[0])
