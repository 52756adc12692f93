"""Products of many rows on a GPU of sm_90: the bits of the small tiles."""

import pytest
import torch

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of sm_90"
)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes", [(304, 1040, 1000), (1000, 4096, 4096), (9000, 128, 512)])
def test_it_has_the_bits_of_the_small_tiles(sizes, turned, dtype):
    from kernel_index.core.triton import hopper_products, products

    M, N, K = sizes
    a, b = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((M, K), (K, N)))
    a, b = (
        x if as_it_lies else x.T.contiguous().T
        for x, as_it_lies in zip((a, b), (not turned[0], turned[1]), strict=True)
    )
    bias = torch.randn(N, device="cuda").bfloat16()
    y = torch.empty(M, N, device="cuda", dtype=dtype)
    expected = products.multiply(a, b, bias, y.clone(), products.SQUARE)
    assert torch.equal(hopper_products.multiply(a, b, bias, y), expected)
    if dtype == torch.float32:
        expected = products.multiply(a, b, None, expected, products.SQUARE, add=True)
        assert torch.equal(hopper_products.multiply(a, b, None, y, add=True), expected)


@on_hopper
def test_a_sum_in_parts_is_right_and_the_same_every_time():
    from kernel_index.core.triton import hopper_products

    a, b = (torch.randn(30_000, n, device="cuda").bfloat16() for n in (520, 512))
    y = torch.empty(520, 512, device="cuda", dtype=torch.bfloat16)
    parts = hopper_products.parts_of(a.T, b)
    assert parts > 1
    found = hopper_products.multiply_in_parts(a.T, b, y, parts).clone()
    assert torch.equal(hopper_products.multiply_in_parts(a.T, b, y, parts), found)
    exact = a.double().T @ b.double()
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3 * 30_000**0.5)


@on_hopper
@pytest.mark.parametrize("biased", [False, True])
def test_a_launch_that_repeats_an_earlier_one_has_its_bits(biased):
    """Operands at other addresses, turned or not; and between them another number of rows and of columns."""
    from kernel_index.core.triton import products

    bias = torch.randn(1040, device="cuda").bfloat16() if biased else None
    for turned in (False, True, False, True):
        for rows in (9000, 8968, 9000):
            a, b = torch.randn(rows, 1000, device="cuda").bfloat16(), torch.randn(1000, 1040, device="cuda").bfloat16()
            if turned:
                a, b = a.T.contiguous().T, b.T.contiguous().T
            y = torch.empty(rows, 1040, device="cuda", dtype=torch.bfloat16)
            expected = products.multiply(a, b, bias, y.clone(), products.SQUARE)
            assert torch.equal(products.multiply(a, b, bias, y), expected)


@on_hopper
def test_a_layer_that_is_called_again_has_the_same_bits_and_says_what_ran():
    import kernel_index as ki

    weight = torch.randn(1040, 512, device="cuda", requires_grad=True)
    x, d_y = torch.randn(4, 2048, 512, device="cuda"), torch.randn(4, 2048, 1040, device="cuda").bfloat16()

    def call():
        with ki.numerics("invariant"), torch.autocast("cuda", torch.bfloat16):
            leaf = x.clone().requires_grad_()
            y = ki.linear(leaf, weight)
        return y, *torch.autograd.grad(y, (leaf, weight), d_y)  # behind the block

    with ki.receipts() as log:
        first = call()
    for again in (call(), call()):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with ki.receipts() as again:
        call()
    assert [(r.ran, r.numerics) for r in again] == [(r.ran, r.numerics) for r in log] == [("triton", log[0].numerics)]
    with ki.numerics("invariant"), pytest.raises(ValueError, match="weight must be"):
        ki.linear(x, weight[:, :500])
