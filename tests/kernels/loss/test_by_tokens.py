"""Many tokens for each channel on a GPU: gradients are formed with the loss, chunk by chunk of tokens."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core.triton.launch import interpreting
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import torch_op, torch_op_sliced

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")

OPTIONS = {"softcap": 15.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2, "valid_vocab": 80}


def inputs(dtype=torch.float32, tokens=69):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (tokens, 83))
    targets = torch.randint(0, 80, (tokens,), generator=generator)
    targets[::2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.fixture
def chunks(monkeypatch):
    """Small logits count as large ones; the tokens of every chunk of such a call."""
    seen, losses = [], torch_op._Chunks.losses

    def recorded(self, z, targets, *rest):
        seen.append((self.passes, z.shape[0]))
        return losses(self, z, targets, *rest)

    monkeypatch.setattr(torch_op_sliced, "CHUNK_BYTES", 0)
    monkeypatch.setattr(torch_op._Chunks, "losses", recorded)
    return seen


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all options"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_gradients_are_those_of_the_reference(chunks, options, bias, dtype):
    options = {"valid_vocab": 80} | options
    h, w, t = inputs(dtype)
    leaves = [h, w, *([torch.linspace(-1, 1, 83).to(dtype).requires_grad_()] if bias else [])]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = []
    for tensors, backend in ((leaves, "triton"), (exact, "reference")):
        more = {"bias": tensors[2]} if bias else {}
        loss = ki.fused_linear_cross_entropy(*tensors[:2], t, **options, **more, backend=backend)
        found.append((loss, *torch.autograd.grad(3.0 * loss, tensors)))
    assert chunks == [("fused", 14)] * 4 + [("fused", 13)]
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    assert not found[0][2][80:].any(), "padding has no gradient"


@pytest.mark.parametrize(
    "more", [{"chunk_size": 69}, {"reduction": "none"}, {"valid_vocab": 79}], ids=lambda more: next(iter(more))
)
def test_other_calls_go_by_slices(chunks, more):
    h, w, t = inputs()
    ki.fused_linear_cross_entropy(
        h, w, t.clamp(max=78), **{"valid_vocab": 80} | more, backend="triton"
    ).sum().backward()
    ki.fused_linear_cross_entropy(h[:63], w, t[:63], valid_vocab=80, backend="triton").backward()  # few tokens
    ki.fused_linear_cross_entropy(h, w.detach(), t, valid_vocab=80, backend="triton").backward()
    with torch.no_grad():
        ki.fused_linear_cross_entropy(h, w, t, valid_vocab=80, backend="triton")
    assert not chunks


def test_a_checkpoint_and_a_second_backward_find_the_same_gradients(chunks):
    h, w, t = inputs()
    call = lambda h, w: ki.fused_linear_cross_entropy(h, w, t, valid_vocab=80, backend="triton")  # noqa: E731
    loss = call(h, w)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(loss, (h, w))
    kept = torch.autograd.grad(checkpoint(call, h, w, use_reentrant=False), (h, w))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, kept, strict=True))
    assert chunks
