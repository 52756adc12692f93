"""How registered operators are called."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core import ops


def test_a_launcher_is_called_directly_where_nothing_would_see_the_op():
    on_a_gpu, elsewhere = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    called = lambda x: ops.run(lambda _: "op", lambda _: "launcher", x)  # noqa: E731
    assert called(on_a_gpu) == "launcher"
    assert called(elsewhere) == "op"
    with FakeTensorMode():
        assert called(on_a_gpu) == "op"
    seen = []
    torch.func.vmap(lambda x: seen.append(called(on_a_gpu)) or x)(torch.zeros(2))
    assert seen == ["op"]


def test_a_backward_reads_what_was_saved_once():
    """A checkpoint that computes saved tensors again gives them once: a second look is an error there."""
    found = []
    for path in Path(ki.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                reads = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "saved_tensors"]
                found += [f"{path.name}: {node.name}"] * (len(reads) > 1)
    assert not found


@pytest.mark.parametrize("with_lse", [False, True])
def test_the_loss_inside_a_checkpoint(with_lse):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    targets = torch.tensor([1, 2, -100, 4, 5, 11])

    def loss():
        if not with_lse:
            return ki.fused_linear_cross_entropy(hidden, weight, targets)
        found = ki.fused_linear_cross_entropy_with_lse(hidden, weight, targets)
        return found[0] + found[1].sum()

    expected = torch.autograd.grad(loss(), (hidden, weight))
    again = torch.autograd.grad(checkpoint(loss, use_reentrant=False), (hidden, weight))
    assert all(map(torch.equal, expected, again))
