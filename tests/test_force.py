"""``ki.force``: nesting, threads, backward passes, recomputation, compiled code."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core import force
from kernel_index.core.force import forced_here, reload_environment, resumed

LARGE = 1 << 17  # elements from which "auto" compiles a region


def ran(log: ki.Receipt) -> list[str]:
    return [receipt.ran for receipt in log]


def squared(x, backend="auto"):
    return ki.fused_relu_squared(x, backend=backend)


def test_every_op_runs_the_named_backend_and_the_receipt_says_why():
    with ki.receipts() as log, ki.force("reference"):
        squared(torch.ones(LARGE))
        squared(torch.ones(LARGE), backend="inductor")
    assert ran(log) == ["reference", "reference"]
    assert {r.forced_by for r in log} == {"ki.force"}
    assert [r.requested for r in log] == ["auto", "inductor"]


def test_blocks_nest_and_the_innermost_that_names_an_op_decides():
    q = torch.ones(1, 4, 1, 8)
    with ki.receipts() as log, ki.force("reference"):
        with ki.force("sdpa", "attention"):
            ki.attention(q, q, q)
            squared(torch.ones(3))
        ki.attention(q, q, q)
    assert ran(log) == ["sdpa", "reference", "reference"]
    assert forced_here() == ()


def test_a_block_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("KERNEL_INDEX_BACKEND", "reference")
    reload_environment()
    q = torch.ones(1, 4, 1, 8)
    with ki.receipts() as log:
        with ki.force("sdpa", "attention"):
            ki.attention(q, q, q)
        ki.attention(q, q, q)
    assert ran(log) == ["sdpa", "reference"]


def test_an_exception_leaves_the_block():
    with pytest.raises(ki.Ineligible, match=r"forced by ki\.force"), ki.force("triton", "fused_relu_squared"):
        squared(torch.ones(3, dtype=torch.float64))
    assert forced_here() == ()


def test_other_threads_are_not_touched():
    found = []

    def elsewhere():
        with ki.receipts(every_thread=False) as log:
            squared(torch.ones(LARGE))
        found.extend(log)

    with ki.force("reference"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found[0].forced_by is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "backend must be a string, got NoneType"),
        (("",), ValueError, "backend must be the name of a backend, got ''"),
        (("reference", "relu"), ValueError, "ops must be names of public functions of kernel_index, got 'relu'"),
        (("reference", 3), TypeError, "ops must be a string, got int"),
    ],
)
def test_wrong_names_are_refused(arguments, error, message):
    with pytest.raises(error, match=message), ki.force(*arguments):
        pass
    assert forced_here() == ()


class Recomputes(torch.autograd.Function):
    """Calls an op again in its backward, as layers do that store no activation."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.forced = forced_here()
        return squared(x)

    @staticmethod
    def backward(ctx, grad):
        with resumed(ctx.forced):
            return grad * squared(ctx.saved_tensors[0])


@pytest.mark.parametrize("inside", [True, False])
def test_a_backward_that_recomputes_is_under_the_block_of_its_forward(inside):
    x = torch.ones(LARGE, requires_grad=True)
    with ki.receipts() as log:
        with ki.force("reference"):
            out = Recomputes.apply(x).sum()
            if inside:
                out.backward()
        if not inside:
            out.backward()
    assert [r.forced_by for r in log] == ["ki.force"] * 2


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_is_recomputed_under_the_block_that_it_was_called_in(inside):
    """Without it the recomputation would save other tensors than the forward, which is an error of PyTorch's."""
    x = torch.ones(LARGE, requires_grad=True)
    with ki.receipts() as log:
        with ki.force("reference"):
            out = checkpoint(squared, x, use_reentrant=False).sum()
            if inside:
                out.backward()
        if not inside:
            out.backward()
    assert [r.tried for r in log] == [
        "reference",
        "reference",
    ]  # PyTorch stops the second one when it has what it needs
    assert [r.forced_by for r in log] == ["ki.force", "ki.force"]
    torch.testing.assert_close(x.grad, torch.full((LARGE,), 2.0))


def test_a_block_inside_a_checkpoint_is_entered_by_the_recomputation_itself():
    def function(x):
        with ki.force("reference"):
            y = squared(x)
        return y + squared(x)

    x = torch.ones(LARGE, requires_grad=True)
    with ki.receipts() as log:
        checkpoint(function, x, use_reentrant=False).sum().backward()
    assert [r.forced_by for r in log] == ["ki.force", None] * 2


def test_compiled_code_is_traced_once_for_each_setting():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(x):
        return squared(x)

    torch._dynamo.reset()
    x = torch.ones(8)
    with ki.receipts() as log:
        for _ in range(2):
            compiled(x)
            with ki.force("reference"):
                compiled(x)
    assert len(graphs) == 2
    assert [r.forced_by for r in log] == [None, "ki.force"]
    torch._dynamo.reset()


def test_a_block_inside_a_traced_function():
    """One graph, that is traced once; what is outside of the block is not in it, and the thread is left as it was."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(x):
        with ki.force("reference"):
            y = squared(x)
            with ki.force("sdpa", "attention"):
                q = x[:8].view(1, 2, 1, 4)
                z = ki.attention(q, q, q)
        return y + squared(x), z

    torch._dynamo.reset()
    x = torch.arange(LARGE, dtype=torch.float32, requires_grad=True)
    with ki.receipts() as log:
        for _ in range(2):
            found, _ = compiled(x)
            assert torch.equal(found, 2 * x.detach().square())
            assert forced_here() == ()
            assert force._THREAD.forced == ()
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], 4 * x.detach())
    assert len(graphs) == 1
    assert ran(log) == ["reference", "sdpa", "reference"]
    assert [r.forced_by for r in log] == ["ki.force", "ki.force", None]


def test_a_block_in_which_a_trace_breaks():
    """What cannot be traced runs in the block too."""

    @torch._dynamo.disable
    def untraced(x):
        return squared(x)

    @torch.compile(backend="eager")
    def compiled(x):
        with ki.force("reference"):
            return squared(x + 1) + untraced(x)

    torch._dynamo.reset()
    with ki.receipts() as log:
        compiled(torch.ones(LARGE))
    assert {(r.ran, r.forced_by) for r in log} == {("reference", "ki.force")}
    assert forced_here() == ()


def test_a_block_directly_inside_of_its_like_is_no_other_setting():
    graphs = []

    @torch.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    def compiled(x):
        return squared(x)

    torch._dynamo.reset()
    with ki.force("reference"):
        compiled(torch.ones(3))
        with ki.force("reference"):
            compiled(torch.ones(3))
    assert len(graphs) == 1


def test_strict_blocks_and_forced_references_agree():
    with ki.strict(), ki.force("reference"):
        squared(torch.ones(2))
