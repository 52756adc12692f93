"""Products of many rows on a GPU of sm_90: the bits of the small tiles."""

import pytest
import torch

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of sm_90"
)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes", [(300, 1040, 1000), (1000, 4096, 4096), (9000, 128, 512)])
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
