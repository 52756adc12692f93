"""A comparison whose tolerance is what float32 itself costs."""

import torch


def assert_as_exact_as_float32(ours, plain, exact):
    """Two float32 computations of one value: ours may be off by twice the error of the plain one, and some rounding."""
    scale = exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 16 * torch.finfo(torch.float32).eps * scale
    assert (ours.double() - exact).abs().max() <= allowed
