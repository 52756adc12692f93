"""``gated_rms_norm``: PyTorch's norm of the gated values, groups, what is not finite, and refusals."""

import pytest
import torch
from torch.nn import functional as F

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.kernels.state_space.gated_rms_norm.cases import call

BACKENDS = ("triton", "reference")
NAN = float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_norm_of_the_gated_values(backend):
    kwargs = call(Maker(torch.float32), 7, 40)
    exact = {n: v.double() for n, v in kwargs.items()}
    expected = F.rms_norm(exact["x"] * F.silu(exact["gate"]), (40,), exact["weight"], 1e-6)
    found = ki.gated_rms_norm(**kwargs, backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
def test_the_dtype_of_the_result(backend, gated):
    """It is rounded once; gradients have the arguments' dtypes."""
    kwargs = {n: v.requires_grad_() for n, v in call(Maker(torch.float32), 7, 40).items()}
    kwargs = kwargs if gated else kwargs | {"gate": None}
    wide = ki.gated_rms_norm(**kwargs, backend=backend)
    found = ki.gated_rms_norm(**kwargs, dtype=torch.float16, backend=backend)
    assert torch.equal(found, wide.to(torch.float16))
    leaves = [v for v in kwargs.values() if v is not None]
    upstream = torch.randn(7, 40).to(torch.float16)
    pairs = zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wide, leaves, upstream.float()), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_rows_of_their_own(backend):
    kwargs = call(Maker(torch.float32), 5, 48, groups=3)
    found = ki.gated_rms_norm(**kwargs, backend=backend)
    for g in range(3):
        part = {n: kwargs[n][..., 16 * g : 16 * g + 16] for n in ("x", "gate", "weight")}
        torch.testing.assert_close(
            found[..., 16 * g : 16 * g + 16], ki.gated_rms_norm(**part, backend=backend), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "gate"])
def test_nan_stays_in_its_group_of_its_row(backend, name):
    kwargs = call(Maker(torch.float32), 4, 24, groups=2)
    plain = ki.gated_rms_norm(**kwargs, backend=backend)
    kwargs[name][2, 3] = NAN
    leaves = {n: kwargs[n].requires_grad_() for n in ("x", "gate")}
    y = ki.gated_rms_norm(**kwargs, backend=backend)
    assert y[2, :12].isnan().all()
    y = y.detach().clone()
    y[2, :12] = plain[2, :12]
    assert torch.equal(y, plain)
    out = ki.gated_rms_norm(**kwargs, backend=backend)
    for gradient in torch.autograd.grad(out.sum(), list(leaves.values())):
        gradient[2, :12] = 0.0
        assert gradient.isfinite().all()


BAD = {
    "x must be [..., C] with C of at least 1": {"x": torch.ones(4, 0)},
    "gate must be of x's shape": {"gate": torch.ones(4, 12)},
    "weight must be [C] (24,)": {"weight": torch.ones(12)},
    "eps must be at least 0": {"eps": -1.0},
    "groups must divide the 24 channels of x, got 5": {"groups": 5},
    "groups must be at least 1": {"groups": 0},
    "dtype must be a floating dtype or None, got torch.int64": {"dtype": torch.int64},
}


@pytest.mark.parametrize("message", BAD)
def test_what_it_refuses(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ki.gated_rms_norm(**call(Maker(torch.float32), 4, 24) | BAD[message])
    assert message in str(error.value)


def test_a_group_that_is_too_wide_is_the_references():
    kwargs = call(Maker(torch.float32), 1, 8200)
    with pytest.raises(ki.Ineligible, match="needs groups of at most 8192 channels"):
        ki.gated_rms_norm(**kwargs, backend="triton")
    ki.gated_rms_norm(**kwargs | {"groups": 2}, backend="triton")
