"""Convolution and scan over a tree under transforms of ``torch.func``."""

import torch

import kernel_index as ki
from kernel_index.nn.tree_scan import mix_tree

PACKING = ki.pack_tree([-1, 0, 0], [3, 2, 1])


def operands():
    torch.manual_seed(0)
    shapes = (1, 6, 14), (1, 6, 2)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def mixed(*given):
    a, weight = -torch.ones(2, dtype=torch.float64), torch.linspace(-1, 1, 14 * 3, dtype=torch.float64).view(14, 3)

    def convolve(inputs, segments, before):
        return ki.causal_conv1d(inputs, weight, activation="silu", segments=segments, state=before)

    def scan(x, dt, segments, state):
        x, b, c = (t.unflatten(-1, (n, -1)) for t, n in zip(x.split([6, 4, 4], -1), (2, 1, 1), strict=True))
        return ki.ssd_scan(x, dt, a, b, c, segments=segments, state=state, dt_softplus=True, chunk=2)

    return mix_tree(convolve, scan, 3, *given, ki.MaskContract(subtree_end=PACKING.subtree_end), None)


def test_torch_func():
    given = operands()
    leaves = [x.clone().requires_grad_() for x in given]
    expected = torch.autograd.grad(mixed(*leaves).square().sum(), leaves)
    found = torch.func.grad(lambda *x: mixed(*x).square().sum(), (0, 1))(*given)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    two = torch.stack([given[0], 2 * given[0]])
    every = torch.func.vmap(lambda x: mixed(x, *given[1:]))(two)
    torch.testing.assert_close(every, torch.stack([mixed(x, *given[1:]) for x in two]), rtol=1e-12, atol=1e-12)
