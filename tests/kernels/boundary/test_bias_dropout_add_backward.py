"""Gradients, replay and compilation of fused_bias_dropout_add."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton.launch import interpreting
from kernel_index.kernels.boundary.fused_bias_dropout_add import inductor, torch_op
from tests.kernels.boundary.test_fused_bias_dropout_add import BACKENDS, BF16, mask_of, operands


def test_one_variant_whatever_the_rows_the_seed_and_p():
    regions = (inductor._forward_region, inductor._backward_region, inductor._bits_region)
    for region in regions:
        region.variants.clear()
    for rows, p in ((2, 0.1), (7, 0.2), (40, 0.9), (129, 1.0)):
        x, residual, bias = operands(rows, 192)
        ki.fused_bias_dropout_add(x, residual, bias=bias, p=p, seed=rows, backend="inductor").sum().backward()
    assert [len(region.variants) for region in regions] == [1, 1, 1]


# The sum ---------------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("width", [64, 17])
def test_p_of_one_is_the_residual_exactly(backend, width):
    """Bit for bit, a negative zero and an infinite x included; no gradient reaches x, and none is NaN."""
    x, residual, bias = operands(4, width)
    with torch.no_grad():
        x[0, 0], x[1, 1], residual[0, 0], residual[2, 2] = float("inf"), float("nan"), -0.0, float("inf")
    out = ki.fused_bias_dropout_add(x, residual, bias=bias, p=1.0, seed=1, backend=backend)
    assert torch.equal(out.view(torch.int32), residual.view(torch.int32))
    dx, dresidual, dbias = torch.autograd.grad(out.sum(), (x, residual, bias))
    assert dx.eq(0).all()
    assert dbias.eq(0).all()
    assert dresidual.eq(1).all()


@BACKENDS
@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.5, "training": False}, {"p": 0.5, "seed": 1}], ids=str)
def test_nothing_is_written_or_shared(backend, options):
    """Also where nothing needs a gradient, x is the residual, and x is expanded."""
    x, residual, bias = (t.detach() for t in operands(4, 64))
    for x, residual in ((x, residual), (x, x), (x[:1].expand(4, 64), residual)):  # noqa: B020
        copies = x.clone(), residual.clone(), bias.clone()
        out = ki.fused_bias_dropout_add(x, residual, bias=bias, **options, backend=backend)
        assert not {out.data_ptr()} & {x.data_ptr(), residual.data_ptr(), bias.data_ptr()}
        assert all(torch.equal(a, b) for a, b in zip((x, residual, bias), copies, strict=True))
        if "seed" not in options:
            torch.testing.assert_close(out, residual + (x + bias))


@BACKENDS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stream", [torch.float32, BF16])
@pytest.mark.parametrize("branch", [torch.float32, BF16])
def test_output_dtype_is_the_residuals(backend, training, stream, branch):
    x, residual, bias = torch.ones(2, 8).to(branch), torch.ones(2, 8).to(stream), torch.ones(8)
    out = ki.fused_bias_dropout_add(x, residual, bias=bias, p=0.5, training=training, seed=1, backend=backend)
    assert out.dtype == stream


@BACKENDS
def test_one_rounding(backend):
    """bfloat16 x and bias into a float32 residual: the sum x + bias and the scaling are not rounded on the way."""
    x = torch.randn(9, 64, dtype=BF16)
    residual, bias = torch.zeros(9, 64), torch.randn(64, dtype=BF16)
    out = ki.fused_bias_dropout_add(x, residual, bias=bias, p=0.3, seed=1, backend=backend).double()
    exact = (x.double() + bias.double()) / 0.7
    torch.testing.assert_close(out[out != 0], exact[out != 0], rtol=1e-6, atol=0)


@BACKENDS
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.thorough_if(when=lambda backend, **_: backend == "triton")
def test_bias_gradient_is_summed_in_float32(backend, p):
    """1000 terms of 1 or 2: a sum in bfloat16 stops at 256."""
    x, residual, bias = torch.zeros(1000, 64, dtype=BF16), torch.zeros(1000, 64, dtype=BF16), torch.zeros(64)
    out = ki.fused_bias_dropout_add(x, residual, bias=bias.requires_grad_(), p=p, seed=6, backend=backend)
    (dbias,) = torch.autograd.grad(out.sum(), bias)
    count = mask_of((1000, 64), p=p, seed=6, backend="reference").sum(0) if p else torch.full((64,), 1000)
    assert torch.equal(dbias, count / (1 - p))


@BACKENDS
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_leaf_gradients_own_their_memory(backend, p):
    x, residual, bias = operands(4, 64)
    for _ in range(2):
        ki.fused_bias_dropout_add(x, residual, bias=bias, p=p, seed=1, backend=backend).backward(torch.ones(4, 64))
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    x.grad.zero_()
    assert residual.grad.eq(2).all()


def test_without_dropout_the_gradient_passes_through(monkeypatch):
    """p = 0, no bias: no kernel runs in backward and nothing is copied."""
    x, residual, _ = operands(4, 64)
    out = ki.fused_bias_dropout_add(x, residual, backend="inductor")
    monkeypatch.setattr(inductor, "_backward_region", None)
    upstream = torch.randn(4, 64)
    grads = torch.autograd.grad(out, (x, residual), upstream)
    assert [g.data_ptr() for g in grads] == [upstream.data_ptr()] * 2


def test_infinite_x_is_dropped_like_any_other():
    out = ki.fused_bias_dropout_add(torch.full((999,), float("inf")), torch.ones(999), p=0.5, seed=2)
    assert out[~mask_of((999,), p=0.5, seed=2)].eq(1).all()


REFUSALS = {
    "x must be a torch.Tensor, got list": {"x": [1.0]},
    "x must be a floating-point tensor, got torch.int64": {"x": torch.ones(2, 4, dtype=torch.int64)},
    "residual must be a floating-point tensor, got torch.bool": {"residual": torch.ones(2, 4).bool()},
    "residual must be of x's shape (2, 4), got shape (4,)": {"residual": torch.ones(4)},
    "residual must be of x's shape (2, 4), got shape (2, 1)": {"residual": torch.ones(2, 1)},
    "residual must be on the device of x (cpu), got meta": {"residual": torch.ones(2, 4, device="meta")},
    "bias must be of shape (4,), got shape (1,)": {"bias": torch.ones(1)},
    "bias must be of shape (4,), got shape (2, 4)": {"bias": torch.ones(2, 4)},
    "bias must be a floating-point tensor, got torch.int32": {"bias": torch.ones(4, dtype=torch.int32)},
    "bias must be None for an x of rank 0, got a tensor": {
        "x": torch.tensor(1.0), "residual": torch.tensor(1.0), "bias": torch.ones(1),
    },
    "p must be between 0 and 1, got 1.5": {"p": 1.5},
    "p must be between 0 and 1, got -0.1": {"p": -0.1},
    "p must be finite, got nan": {"p": float("nan")},
    "p must be a number, got Tensor": {"p": torch.tensor(0.5)},
    "training must be True or False, got int": {"training": 1},
    "seed must be an integer, got float": {"seed": 1.0},
    "seed must be an integer, got bool": {"seed": True},
    "seed must fit into 64 bits, got 9223372036854775808": {"seed": 2**63},
    "seed must be torch.int64 or a Python integer, got torch.int32": {"seed": torch.tensor(1, dtype=torch.int32)},
    "seed must be one number, got shape (2,)": {"seed": torch.tensor([1, 2])},
    "seed must be on the device of x (cpu), got meta": {"seed": torch.ones((), dtype=torch.int64, device="meta")},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    good = {"x": torch.ones(2, 4), "residual": torch.ones(2, 4)}
    with pytest.raises((TypeError, ValueError)) as error:
        ki.fused_bias_dropout_add(**(good | REFUSALS[message]))
    assert str(error.value) == message


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [1, 130, 256, 257, 700])
@pytest.mark.parametrize("width", [192, 70])
def test_few_rows_are_summed_by_one_launch_and_many_by_two(rows, width, p):
    """Ones above: the gradient of the bias counts the elements that were kept, exactly."""
    x, residual, bias = operands(rows, width)
    out = ki.fused_bias_dropout_add(x, residual, bias=bias, p=p, seed=3, backend="triton")
    dx, dbias = torch.autograd.grad(out.sum(), (x, bias))
    kept = mask_of((rows, width), p, 3, backend="triton") if p else torch.ones(rows, width)
    torch.testing.assert_close(dx, kept.to(dx.dtype) / (1 - p), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(dbias, kept.sum(0).to(dbias.dtype) / (1 - p), rtol=1e-6, atol=0.0)


@pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")
def test_backward_takes_the_seed_as_it_was_saved(monkeypatch):
    """A launch that inverts eight bytes would take as long as the gradient of a few rows."""
    given = []
    launch = torch_op._launch_backward

    def seen(g, seed, *rest):
        given.append((int(seed), rest[-1]))
        return launch(g, seed, *rest)

    monkeypatch.setattr(torch_op, "_backward_op", seen)
    x, r = torch.ones(3, 64, requires_grad=True), torch.zeros(3, 64)
    out = ki.fused_bias_dropout_add(x, r, p=0.5, seed=11, backend="triton")
    (d,) = torch.autograd.grad(out.sum(), x)
    assert given == [(~11, True)]
    assert torch.equal(d != 0, out != 0)
