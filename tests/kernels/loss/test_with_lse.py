"""The loss with its log-sum-exp: the bits of the loss, gradients through each output, and what an unused one costs."""

import pytest
import torch

import kernel_index as ki
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import torch_op

BACKENDS = ("triton", "inductor", "chunked", "reference")
OPTIONS = {"softcap": 15.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2, "chunk_size": 8}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(tokens=21, width=16, vocab=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (tokens, vocab))
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_its_gradients_have_the_bits_of_the_plain_function(backend, reduction, dtype):
    h, w, t = inputs(dtype=dtype)
    call = OPTIONS | {"reduction": reduction, "backend": backend}
    plain = ki.fused_linear_cross_entropy(h, w, t, **call)
    ours = ki.fused_linear_cross_entropy_with_lse(h, w, t, **call)
    assert torch.equal(ours.loss, plain)
    g = torch.arange(1.0, 1 + plain.numel()).view(plain.shape)
    for a, b in zip(torch.autograd.grad(ours.loss, (h, w), g), torch.autograd.grad(plain, (h, w), g), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("used", ["loss", "lse", "z_loss"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_each_output_alone_has_its_gradient(backend, reduction, used):
    *leaves, t = inputs()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    call = OPTIONS | {"reduction": reduction}
    found = []
    for (h, w), which in ((leaves, backend), (exact, "reference")):
        out = getattr(ki.fused_linear_cross_entropy_with_lse(h, w, t, **call, backend=which), used)
        upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        found.append(torch.autograd.grad(out, (h, w), upstream))
    for actual, exact in zip(*found, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_are_zero_and_have_no_gradient(backend):
    h, w, t = inputs()
    lse = ki.fused_linear_cross_entropy_with_lse(h, w, t, **OPTIONS, backend=backend).lse
    assert (lse[t == -100] == 0).all()
    assert (lse[t != -100] != 0).all()
    (d,) = torch.autograd.grad(lse, h, torch.ones_like(lse))
    assert not d[t == -100].any()
    assert d[t != -100].any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_an_ignored_row_may_hold_nan(backend):
    h, w, t = inputs()
    clean = ki.fused_linear_cross_entropy_with_lse(h, w, t, **OPTIONS, backend=backend)
    expected = torch.autograd.grad((clean.loss, clean.lse.sum(), clean.z_loss), h)[0]
    dirty = torch.where((t == -100)[:, None], torch.nan, h.detach()).requires_grad_()
    found = ki.fused_linear_cross_entropy_with_lse(dirty, w, t, **OPTIONS, backend=backend)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad((found.loss, found.lse.sum(), found.z_loss), dirty)[0], expected)


def test_an_unused_output_costs_no_pass(monkeypatch):
    h, w, t = inputs()
    calls = []
    monkeypatch.setattr(torch_op, "_gradients_op", lambda *a, op=torch_op._gradients_op: calls.append(1) or op(*a))
    out = ki.fused_linear_cross_entropy_with_lse(h, w, t, **OPTIONS, backend="chunked")
    out.loss.backward(retain_graph=True)
    assert len(calls) == 1, "the pass of the forward"
    (out.loss + out.lse.sum() + out.z_loss).backward()
    assert len(calls) == 2, "one more pass for all three"


@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.thorough_if(when=lambda backend: backend == "triton")
def test_float16_keeps_small_parts_of_a_mean(backend):
    """1/n of a token times a small probability is no float16; the log-sum-exp's gradient has the same care."""
    h, w, t = inputs(tokens=4096, width=4, vocab=64, dtype=torch.float16)
    out = ki.fused_linear_cross_entropy_with_lse(h, w, t, z_loss=1e-2, backend=backend)
    d = torch.autograd.grad(out.loss + out.lse.mean(), w)[0].double()
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    out = ki.fused_linear_cross_entropy_with_lse(h64, w64, t, z_loss=1e-2, backend="reference")
    exact = torch.autograd.grad(out.loss + out.lse.mean(), w64)[0]
    assert (d - exact).abs().max() / exact.abs().max() < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes(reduction):
    h, w, t = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randint(0, 11, (2, 3))
    out = ki.fused_linear_cross_entropy_with_lse(h, w, t, reduction=reduction, backend="chunked")
    assert out.lse.shape == t.shape
    assert out.loss.shape == out.z_loss.shape == (t.shape if reduction == "none" else ())
