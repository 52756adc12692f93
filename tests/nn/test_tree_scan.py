"""The scan over a tree under transforms of ``torch.func``."""

import torch

import kernel_index as ki
from kernel_index.nn.tree_scan import scan_tree

PACKING = ki.pack_tree([-1, 0, 0], [3, 2, 1])


def operands():
    torch.manual_seed(0)
    shapes = (1, 6, 2, 3), (1, 6, 2), (1, 6, 1, 4), (1, 6, 1, 4)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def scan(*given):
    a = -torch.ones(2, dtype=torch.float64)

    def layer(x, dt, b, c, segments, state):
        return ki.ssd_scan(x, dt, a, b, c, segments=segments, state=state, dt_softplus=True, chunk=2)

    return scan_tree(layer, given, ki.MaskContract(subtree_end=PACKING.subtree_end), None)


def test_torch_func():
    given = operands()
    leaves = [x.clone().requires_grad_() for x in given]
    expected = torch.autograd.grad(scan(*leaves).square().sum(), leaves)
    found = torch.func.grad(lambda *x: scan(*x).square().sum(), (0, 1, 2, 3))(*given)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    two = torch.stack([given[0], 2 * given[0]])
    every = torch.func.vmap(lambda x: scan(x, *given[1:]))(two)
    torch.testing.assert_close(every, torch.stack([scan(x, *given[1:]) for x in two]), rtol=1e-12, atol=1e-12)
