"""An offset shared by all logits of a row changes neither the loss nor its gradients, whatever its size.

The logits here are integers, so that float32 holds them exactly beside the offset.
"""

import pytest
import torch

import kernel_index as ki

BACKENDS = ("triton", "inductor", "chunked", "reference")
OFFSETS = (0.0, 2.0**20, -(2.0**23))


def inputs():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.eye(6)  # logits are columns of the weight
    weight = torch.randint(-3, 4, (9, 6), generator=generator).float()
    return hidden, weight, torch.tensor([0, 3, 8, -100, 5, 2])


def results(offset, backend, dtype=torch.float32, **options):
    hidden, weight, targets = inputs()
    bias = torch.full((9,), offset)
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    loss = ki.fused_linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], backend=backend, **options)
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_do_not_change(backend, smoothing, reduction, offset):
    options = {"label_smoothing": smoothing, "reduction": reduction}
    exact = results(0.0, "reference", torch.float64, **options)
    for actual, expected in zip(results(offset, backend, **options), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_do_not_change(backend, offset):
    hidden, weight, targets = inputs()
    exact = ki.token_log_probs(hidden.double(), weight.double(), targets, backend="reference")
    actual = ki.token_log_probs(hidden, weight, targets, bias=torch.full((9,), offset), backend=backend)
    torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smoothed_loss_of_equal_logits(backend):
    """ln 2 for two classes, also where the sum of the logits is no float32 number."""
    for offset in (1e6, 1e8, 3e38):
        loss = ki.fused_linear_cross_entropy(
            torch.tensor([[offset]]), torch.ones(2, 1), torch.tensor([0]), label_smoothing=0.1, backend=backend
        )
        torch.testing.assert_close(loss, torch.tensor(2.0).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiles_with_rising_and_falling_logits(backend):
    """The maximum that a sum is relative to changes from tile to tile, and the last tile is ragged."""
    rising = torch.arange(5000.0) // 8
    weight = torch.stack((rising, -rising, (rising * 7) % 64), 1)
    targets = torch.tensor([4999, 0, 17])
    exact = ki.fused_linear_cross_entropy(
        torch.eye(3).double(), weight.double(), targets, label_smoothing=0.1, reduction="none", backend="reference"
    )
    actual = ki.fused_linear_cross_entropy(
        torch.eye(3), weight, targets, bias=torch.full((5000,), 2.0**20), label_smoothing=0.1, reduction="none",
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_of_minus_infinity_costs_what_it_costs_in_pytorch(backend):
    bias = torch.tensor([-torch.inf, 0.0, 1.0])
    plain = ki.fused_linear_cross_entropy(
        torch.ones(1, 1), torch.ones(3, 1), torch.tensor([1]), bias=bias, backend=backend
    )
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(1.0 + bias[None], torch.tensor([1])))
    smoothed = ki.fused_linear_cross_entropy(
        torch.ones(1, 1), torch.ones(3, 1), torch.tensor([1]), bias=bias, label_smoothing=0.1, backend=backend
    )
    assert smoothed == torch.inf
