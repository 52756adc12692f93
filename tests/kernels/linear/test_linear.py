"""``ki.linear``: a row's bits depend on that row alone; gradients do not depend on threads."""

import pytest
import torch

import kernel_index as ki
from tests.threads import with_threads

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = ((64, 96), (130, 18), (1026, 34), (2500, 20))  # C and F: tails of vectors, of panels and of blocks of the sum


def drawn(rows: int, width: int, features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    tensors = torch.randn(rows, width), torch.randn(features, width), torch.randn(features)
    return tuple(t.to(dtype) for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "features"), WIDTHS)
def test_a_row_does_not_depend_on_the_others(width, features, dtype):
    x, weight, bias = drawn(300, width, features, dtype)
    with ki.numerics("invariant"):
        together = ki.linear(x, weight, bias)
        for rows in (1, 2, 15, 16, 17, 63, 65, 130):
            for first in (0, 1, 7, 300 - rows):
                alone = ki.linear(x[first : first + rows], weight, bias)
                assert torch.equal(alone, together[first : first + rows]), (rows, first)
        order = torch.randperm(300)
        assert torch.equal(ki.linear(x[order], weight, bias), together[order])
        assert torch.equal(with_threads(3, ki.linear, x, weight, bias), together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_that_are_not_finite_change_nothing(dtype):
    x, weight, _ = drawn(40, 66, 32, dtype)
    with ki.numerics("invariant"):
        expected = ki.linear(x, weight)
        x[3:30] = torch.nan
        found = ki.linear(x, weight)
    assert torch.equal(found[:3], expected[:3])
    assert torch.equal(found[30:], expected[30:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_depend_on_threads_and_that_of_x_has_rows_of_its_own(dtype):
    x, weight, bias = drawn(150, 66, 34, dtype)
    upstream = torch.randn(150, 34).to(dtype)

    def gradients(x, upstream):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with ki.numerics("invariant"):
            out = ki.linear(*leaves)
        return torch.autograd.grad(out, leaves, upstream)

    expected = gradients(x, upstream)
    for actual, wanted in zip(with_threads(3, gradients, x, upstream), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(gradients(x[20:23], upstream[20:23])[0], expected[0][20:23])
    for t, g in zip((x, weight, bias), expected, strict=True):
        assert g.dtype == t.dtype


def test_ordinary_mode_takes_pytorchs_product():
    x, weight, bias = drawn(30, 64, 32, torch.float32)
    with ki.receipts() as log:
        out = ki.linear(x, weight, bias)
    assert (log[0].ran, log[0].numerics) == ("torch", "")
    assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))


def test_the_receipt_names_the_recipe():
    x, weight, _ = drawn(30, 64, 32, torch.float32)
    with ki.receipts() as log, ki.numerics("invariant"):
        ki.linear(x, weight)
        ki.linear(x[:1], weight)
    assert [r.ran for r in log] == ["native", "native"]
    assert log[0].numerics == log[1].numerics != ""


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_without_the_form_are_refused(backend):
    x, weight, _ = drawn(30, 64, 32, torch.float32)
    with pytest.raises(ki.Ineligible, match="has no invariant form"), ki.numerics("invariant"):
        ki.linear(x, weight, backend=backend)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (torch.ones(()), torch.ones(2, 2), None, ValueError, r"x must be \[..., C\], got a tensor of rank 0"),
        (torch.ones(3), torch.ones(2, 2), None, ValueError, r"weight must be \[F, C\] with x's C=3, got shape"),
        (torch.ones(3), torch.ones(3), None, ValueError, r"weight must be \[F, C\], got shape"),
        (torch.ones(3).bfloat16(), torch.ones(2, 3), None, TypeError, "weight must be"),
        (torch.ones(3), torch.ones(2, 3), torch.ones(3), ValueError, r"bias must be \[F\] with weight's F, \(2,\)"),
        (torch.ones(3), 1, None, TypeError, "weight must be a torch.Tensor, got int"),
    ],
)
def test_wrong_arguments(x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        ki.linear(x, weight, bias)


@pytest.mark.native
def test_a_compiled_call_has_the_same_bits():
    x, weight, bias = drawn(50, 64, 32, torch.float32)
    compiled = torch.compile(lambda *t: ki.linear(*t), fullgraph=True, backend="aot_eager")
    with ki.numerics("invariant"):
        assert torch.equal(compiled(x, weight, bias), ki.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 0), (0,), (2, 0, 5)])
def test_a_dimension_of_none(shape, dtype):
    """No channels are a sum of nothing: the bias alone."""
    x, weight, bias = torch.zeros(shape), torch.zeros(4, shape[-1]), torch.arange(4.0)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    with ki.numerics("invariant"):
        found = ki.linear(*leaves)
    torch.testing.assert_close(found, torch.nn.functional.linear(*leaves))
    for t, g in zip(leaves, torch.autograd.grad(found.sum(), leaves), strict=True):
        assert g.shape == t.shape
