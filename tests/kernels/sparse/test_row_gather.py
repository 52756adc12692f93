"""What the conformance test cannot know about the row gathers."""

import pytest
import torch

import kernel_index as ki
from kernel_index.kernels.sparse.row_gather import contract

BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager", "reference"])
BF16 = torch.bfloat16


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.int32])
def test_bit_identical_to_index_select(backend, dtype):
    src = torch.randint(-1000, 1000, (9, 3, 5)).to(dtype)
    if dtype.is_floating_point:
        src[2, 1, 3], src[4, 0, 0] = float("nan"), float("inf")
        src[5, 0, 0] = -0.0
    idx = torch.randint(0, 9, (13,))
    out, expected = ki.gather_rows(src, idx, backend=backend), src.index_select(0, idx)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(out.view(bits), expected.view(bits))


@BACKENDS
@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1])
def test_an_index_out_of_range_raises(backend, bad):
    src, idx = torch.ones(6, 2, 4), torch.tensor([0, bad, 1])
    with pytest.raises(IndexError, match="out of range"):
        src.index_select(0, idx)
    with pytest.raises(IndexError, match="out of range"):
        ki.gather_rows(src, idx, backend=backend)
    with pytest.raises(IndexError, match="out of range"):
        ki.gather_rows_pair(src, src, idx, backend=backend)


@BACKENDS
@pytest.mark.thorough_if(when=lambda backend, dtype: backend == "triton" and dtype == torch.float16)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_duplicates_are_added_up_in_float32(backend, dtype):
    """2500 ones: a sum in bfloat16 stops at 256, in float16 at 2048."""
    src = torch.zeros(3, 1, 2, dtype=dtype, requires_grad=True)
    ki.gather_rows(src, torch.ones(2500, dtype=torch.int64), backend=backend).sum().backward()
    expected = torch.tensor([0.0, 2500.0, 0.0]).to(dtype)
    assert torch.equal(src.grad[:, 0, 0], expected)


@BACKENDS
def test_either_output_may_be_unused(backend):
    a, b = torch.randn(5, 2, 4, requires_grad=True), torch.randn(5, 2, 3, requires_grad=True)
    idx = torch.tensor([4, 0, 4])
    for used, unused in ((0, b), (1, a)):
        out = ki.gather_rows_pair(a, b, idx, backend=backend)[used]
        grads = torch.autograd.grad(out, (a, b), torch.ones_like(out), allow_unused=True)
        assert grads[1 - used] is None
        expected = torch.zeros(5, *out.shape[1:]).index_add_(0, idx, torch.ones_like(out))
        assert torch.equal(grads[used], expected)
        assert unused.grad is None


@BACKENDS
def test_the_gradient_is_the_same_bits_every_time(backend):
    src, idx = torch.randn(4, 2, 8, requires_grad=True), torch.randint(0, 4, (200,))
    upstream = torch.randn(200, 2, 8)
    first, second = (torch.autograd.grad(ki.gather_rows(src, idx, backend=backend), src, upstream)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("widths", [(5, 0), (0, 3), (5, 3)])
def test_long_segments_are_added_up_in_runs(widths, dtype):
    """An alphabet's letters: some never come, one comes more often than a run is long."""
    torch.manual_seed(0)
    idx = torch.cat([torch.randint(1, 6, (300,)), torch.full((257,), 3)])[torch.randperm(557)]
    sources = [torch.randn(8, 2, width or 1, dtype=dtype, requires_grad=width > 0) for width in (5, 3)]
    a, b = (x.detach().requires_grad_(width > 0) for x, width in zip(sources, widths, strict=True))
    found = ki.gather_rows_pair(a, b, idx, backend="triton")
    upstream = [torch.randn(557, 2, x.shape[2]).to(dtype) for x in (a, b)]
    loss = sum((y * g).sum() for y, g, x in zip(found, upstream, (a, b), strict=True) if x.requires_grad)
    loss.backward()
    for x, g in zip((a, b), upstream, strict=True):
        if x.requires_grad:
            exact = torch.zeros(x.shape, dtype=torch.float64).index_add_(0, idx, g.double())
            level = torch.zeros(x.shape, dtype=torch.float64).index_add_(0, idx, g.double().abs())
            unit = 2**-7 if dtype == BF16 else 2**-24  # the interpreter cuts bits off where a device rounds
            bound = 557 * 2**-24 * level + unit * exact.abs()
            assert ((x.grad - exact).abs() <= bound).all()
            assert not x.grad[[0, 6, 7]].any()


@pytest.mark.parametrize("others", [0, 3, 400])
def test_invariant_gradients_of_a_row_do_not_follow_the_others(others):
    """Few of them make short segments of the average, many long ones."""
    torch.manual_seed(1)
    src, upstream = torch.randn(40, 1, 4, requires_grad=True), torch.randn(150, 1, 4)

    def gradient(others):
        more = torch.cat([upstream, torch.randn(others, 1, 4)])
        idx = torch.cat([torch.full((150,), 4), torch.randint(5, 40, (others,))])
        order = torch.cat([torch.arange(150), torch.randint(0, 150, (others,)) + 0.5]).argsort(stable=True)
        with ki.numerics("invariant"), ki.force("triton", "gather_rows"):
            out = ki.gather_rows(src, idx[order])
        return torch.autograd.grad(out, src, more[order])[0][4]

    assert torch.equal(gradient(others), gradient(50))


def test_a_giant_gather_says_so(monkeypatch):
    src = torch.ones(2, 1, 1)
    idx = torch.zeros(contract.GIANT, dtype=torch.int32)
    assert ki.explain("gather_rows", src, idx, backend="triton").verdicts["triton"] is None
    giant = torch.zeros(contract.GIANT + 1, dtype=torch.int32)
    with ki.receipts() as log:
        out = ki.gather_rows(src, giant)
    assert (log[0].ran, dict(log[0].declined)["triton"]) == ("eager", "giant_row_fallback")
    assert out.shape == (contract.GIANT + 1, 1, 1)
    with pytest.raises(ki.Ineligible, match="giant_row_fallback"):
        ki.gather_rows(src, giant, backend="triton")


def test_rules_of_the_triton_backend():
    src, idx = torch.ones(4, 2, 3), torch.tensor([1])
    assert ki.explain("gather_rows", src[:, :, ::2], idx).verdicts["triton"] == "needs contiguous sources"
    assert ki.explain("gather_rows", src, idx[:0]).verdicts["triton"] == "needs at least one row and one element"


REFUSALS = {
    "a must be [N, H, D], got shape (4, 2)": {"a": torch.ones(4, 2)},
    "b must be [N, H, D] with the rows and heads of a, (4, 2), got shape (5, 2, 3)": {"b": torch.ones(5, 2, 3)},
    "b must be [N, H, D] with the rows and heads of a, (4, 2), got shape (4, 1, 3)": {"b": torch.ones(4, 1, 3)},
    "b must be a torch.Tensor, got NoneType": {"b": None},
    "idx must be int32 or int64, got torch.float32": {"idx": torch.ones(3)},
    "idx must be int32 or int64, got torch.bool": {"idx": torch.ones(3).bool()},
    "idx must be [R], got shape (1, 3)": {"idx": torch.ones(1, 3).long()},
    "idx must be on the device of a (cpu), got meta": {"idx": torch.ones(3, device="meta").long()},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    good = {"a": torch.ones(4, 2, 3), "b": torch.ones(4, 2, 3), "idx": torch.tensor([0, 1])}
    with pytest.raises((TypeError, ValueError)) as error:
        ki.gather_rows_pair(**(good | REFUSALS[message]))
    assert str(error.value) == message
