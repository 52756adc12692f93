"""``fused_gated_activation``: the activations of PyTorch, exact zeros, what is kept, and refusals."""

import pytest
import torch
from torch.nn import functional as F

import kernel_index as ki
from kernel_index.kernels.experts.fused_gated_activation.contract import KINDS
from kernel_index.kernels.experts.fused_gated_activation.triton import _row_stride

INF, NAN = float("inf"), float("nan")
BACKENDS = ("triton", "inductor", "reference")
PYTORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def gradients(gate, up, g, kind, backend):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = ki.fused_gated_activation(gate, up, kind=kind, backend=backend)
    return torch.autograd.grad(y, [gate, up], g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_pytorchs_activation(kind, backend):
    gate, up, g = (torch.randn(7, 33) * 3 for _ in range(3))
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    expected = PYTORCH[kind](leaves[0]) * leaves[1]
    d_expected = torch.autograd.grad(expected, leaves, g.double())
    y = ki.fused_gated_activation(gate, up, kind=kind, backend=backend)
    for found, exact in zip((y, *gradients(gate, up, g, kind, backend)), (expected, *d_expected), strict=True):
        torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-6, atol=1e-5)


def test_silu_is_the_default():
    gate, up = torch.randn(5), torch.randn(5)
    assert torch.equal(ki.fused_gated_activation(gate, up), ki.fused_gated_activation(gate, up, kind="silu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["relu", "relu2"])
def test_the_gradient_of_a_closed_gate_is_exactly_zero(kind, backend):
    gate = torch.tensor([-1.0, 0.0, -0.0, -INF, -1.0, 2.0])
    up = torch.tensor([INF, INF, 1e38, 1.0, NAN, 3.0])
    g = torch.tensor([1.0, 1.0, 1e38, INF, 1.0, 1.0])
    d_gate, _ = gradients(gate, up, g, kind, backend)
    assert d_gate.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 3.0 if kind == "relu" else 12.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_propagates(kind, backend):
    gate, up, g = torch.tensor([NAN, 1.0, 1.0]), torch.tensor([1.0, NAN, 1.0]), torch.tensor([1.0, 1.0, NAN])
    y = ki.fused_gated_activation(gate, up, kind=kind, backend=backend)
    assert y.isnan().tolist() == [True, True, False]
    d_gate, d_up = gradients(gate, up, g, kind, backend)
    assert d_gate.isnan().tolist() == [kind != "relu", True, True]  # relu has slope 1 there, as PyTorch's
    assert d_up.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_rounding(kind, backend):
    """float16 overflows where the result does: relu(300)² does not fit into it, relu(300)² · 2⁻⁴ does."""
    gate, up = torch.full((4,), 300.0).half(), torch.full((4,), 0.0625).half()
    y = ki.fused_gated_activation(gate, up, kind=kind, backend=backend)
    assert torch.equal(y, (PYTORCH[kind](gate.double()) * up.double()).half())


@pytest.mark.parametrize("backend", ["triton", "inductor"])
def test_gate_and_up_are_all_that_is_kept(backend):
    kept = []
    gate, up = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ki.fused_gated_activation(gate, up, backend=backend)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}
    details = ki.explain(ki.fused_gated_activation, gate, up, backend=backend).details
    assert details == {"kept_bytes": 2 * 6 * 8 * 4, "recompute_saves_bytes": 6 * 8 * 4}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, backend):
    gate, up = (torch.randn(3, 5, dtype=torch.float32).add(0.1).requires_grad_() for _ in range(2))

    def twice(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (gate, up)]
        grads = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    found = twice(lambda a, b: ki.fused_gated_activation(a, b, kind=kind, backend=backend), torch.float32)
    for a, b in zip(found, twice(lambda a, b: PYTORCH[kind](a) * b, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_rows_that_triton_reads_where_they_are():
    joined = torch.randn(4, 5, 24)
    gate, up = joined.chunk(2, -1)
    assert _row_stride(gate) == _row_stride(up) == 24
    assert _row_stride(joined) == 24
    assert _row_stride(joined[:, :1, :12]) == 120
    assert _row_stride(torch.randn(1, 12).expand(4, 12)) == 0
    for irregular in (joined[:, :3], joined.transpose(0, 1), joined[..., ::2], joined[0].t()):
        assert _row_stride(irregular) is None


REFUSED = {
    "up must be torch.float32 like gate, got torch.float16": (TypeError, {"up": torch.ones(2, 3).half()}),
    "up must be of gate's shape (2, 3), got shape (3,)": (ValueError, {"up": torch.ones(3)}),
    "gate must be a floating-point tensor, got torch.int64": (TypeError, {"gate": torch.ones(2, 3).long()}),
    "kind must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', got 'swish'": (ValueError, {"kind": "swish"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    error, wrong = REFUSED[message]
    call = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3)} | wrong
    with pytest.raises(error) as raised:
        ki.fused_gated_activation(**call)
    assert str(raised.value) == message
