"""``ssd_scan``: the recurrence in chunks, exact decays, documents, what is not finite, and refusals."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.kernels.state_space.ssd_scan import geometry, reference
from kernel_index.kernels.state_space.ssd_scan.cases import call, oracle, raw, segments, state
from kernel_index.proofs.errors import run
from tests.nn.close import assert_as_exact_as_float32

INF, NAN = float("inf"), float("nan")
BACKENDS = ("triton", "reference")
NAMES = ["x", "dt", "a", "b", "c", "d", "dt_bias", "state"]
DOCUMENTS = segments([3, 13, 1, 23], [16, 17, 7])


def kwargs_of(dtype=torch.float32, **more):
    return raw(Maker(dtype), 2, 40, **{"segments": DOCUMENTS, "state": state, **more})


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("continued", [False, True])
def test_chunks_of_any_size_give_the_recurrence(chunk, documents, continued):
    more = {"segments": DOCUMENTS} if documents else {}
    kwargs = raw(Maker(torch.float64), 2, 40, **more, **({"state": state} if continued else {}))
    names = [n for n in NAMES if n in kwargs]
    ours, d_ours = run(ki.ssd_scan, kwargs, names, chunk=chunk)
    expected, d_expected = run(oracle, kwargs, names)
    for a, b in zip(ours + d_ours, expected + d_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("backend", "T", "fast"), [
    ("reference", 300, 1.6), ("reference", 1000, 16.0), ("triton", 120, 1.6), ("triton", 120, 40.0),
])  # fmt: skip
def test_what_decays_fast_costs_later_tokens_no_digits(backend, T, fast, documents):
    """Decays of a slow half behind a fast one: sums over both would leave them the digits of the larger.

    Several heads, because the one gradient of a single ``a`` may be small by chance beside the terms of its sum.
    """
    torch.manual_seed(T)
    H, half = 4, T // 2 - 5  # inside of a chunk
    x, b, c = torch.randn(1, T, H, 3), torch.randn(1, T, 1, 4), torch.randn(1, T, 1, 4)
    dt = torch.cat([torch.full((1, half, H), fast), torch.full((1, T - half, H), 0.0005)], 1)
    more = {"segments": (torch.arange(T) >= half).long()[None]} if documents else {}
    args = [t.requires_grad_() for t in (x, dt, -torch.ones(H), b, c)]
    wide = [t.detach().double().requires_grad_() for t in args]
    upstream = torch.randn(1, T - half, H, 3)

    def results(scan, args, **options):
        y = scan(*args, **more, **options)[0][:, half:]
        return y, *torch.autograd.grad(y, args, upstream.to(y.dtype))

    found = results(ki.ssd_scan, args, backend=backend), results(oracle, args), results(oracle, wide)
    for ours, plain, exact in zip(*found, strict=True):
        assert_as_exact_as_float32(ours, plain, exact)


def test_one_token_is_a_step_of_the_chunked_form():
    kwargs = raw(Maker(torch.float64), 3, 1, state=state)
    y, last = ki.ssd_scan(**kwargs)
    dt = torch.nn.functional.softplus(kwargs["dt"] + kwargs["dt_bias"])
    operands = kwargs["x"] * dt[..., None], dt * kwargs["a"], kwargs["b"], kwargs["c"]
    for ours, theirs in zip(
        (y - kwargs["d"][:, None] * kwargs["x"], last),
        reference.in_chunks(operands, None, kwargs["state"], 64),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_minus_infinity_is_no_token(backend):
    """With the softplus: the state stays, and so do the gradients of all others."""
    kwargs = kwargs_of(segments=None)
    longer = {n: torch.cat([v, torch.randn_like(v[:, :3])], 1) for n, v in kwargs.items() if n in ("x", "b", "c", "dt")}
    longer["dt"] = longer["dt"].index_fill(1, torch.arange(40, 43), -INF)
    upstream = [torch.randn(2, 40, 4, 8), torch.randn(2, 4, 8, 16)]
    names = [n for n in NAMES if n != "d"]

    def cut(**call):
        y, last = ki.ssd_scan(**call)
        return y[:, :40], last

    with_padding, d_with = run(cut, kwargs | longer, names, upstream, backend=backend)
    alone, d_alone = run(cut, kwargs, names, upstream, backend=backend)
    for a, b in zip(with_padding, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(names, d_with, d_alone, strict=True):
        torch.testing.assert_close(a[:, :40] if name in longer else a, b, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["x", "dt", "b", "c"])
def test_what_is_not_finite_stays_in_its_document(backend, name, value):
    """y and gradients of the other documents have the bits that finite values give, and so has y of earlier tokens."""
    kwargs = kwargs_of()
    spoiled = kwargs | {name: kwargs[name].clone()}
    at = 20  # in the last document of row 0, in the middle one of row 1
    spoiled[name][:, at, ..., 0] = value
    names = ["x", "dt", "b", "c"]
    (y, last), gradients = run(ki.ssd_scan, spoiled, names, backend=backend)
    (y_plain, _), g_plain = run(ki.ssd_scan, kwargs, names, backend=backend)
    # The reference takes another formula where a value is not finite.
    close = torch.equal if backend == "triton" else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    before = [slice(0, 17), slice(0, 16)]
    for row in (0, 1):
        assert close(y[row, :at], y_plain[row, :at])
        for found, exact in zip(gradients, g_plain, strict=True):
            assert close(found[row, before[row]], exact[row, before[row]])
    assert close(y[1, 33:], y_plain[1, 33:])
    for found, exact in zip(gradients, g_plain, strict=True):
        assert close(found[1, 33:], exact[1, 33:])
    assert not y[0, at].isfinite().all()
    assert not y[1, at].isfinite().all()
    assert last[1].isfinite().all()
    if name in ("x", "b"):
        assert not last[0].isfinite().all()


def test_what_is_not_finite_in_the_gradient_of_y_stays_in_its_document():
    kwargs = kwargs_of()
    upstream = [torch.randn(2, 40, 4, 8), torch.randn(2, 4, 8, 16)]
    spoiled = [upstream[0].clone(), upstream[1]]
    spoiled[0][:, 20] = NAN
    names = ["x", "dt", "b", "c"]
    _, found = run(ki.ssd_scan, kwargs, names, spoiled, backend="triton")
    _, plain = run(ki.ssd_scan, kwargs, names, upstream, backend="triton")
    for name, a, b in zip(names, found, plain, strict=True):
        assert torch.equal(a[0, :17], b[0, :17]), name
        assert torch.equal(a[1, :16], b[1, :16]), name
        assert torch.equal(a[1, 33:], b[1, 33:]), name
        if name != "dt":  # the decay of a later token is a factor of what earlier ones add
            assert torch.equal(a[0, 21:], b[0, 21:]), name
        assert a[0, 20].isnan().any(), name


def test_the_start_is_a_state_of_the_first_document_alone():
    kwargs = kwargs_of() | {"state": torch.full((2, 4, 8, 16), NAN)}
    for backend in BACKENDS:
        y, last = ki.ssd_scan(**kwargs, backend=backend)
        assert y[0, :3].isnan().all()
        assert y[0, 3:].isfinite().all()
        assert last.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_final_state_may_have_a_gradient(backend):
    kwargs = kwargs_of(segments=None)
    leaf = kwargs["b"].requires_grad_()
    last = ki.ssd_scan(**kwargs, backend=backend).state
    (found,) = torch.autograd.grad(last.sum(), leaf)
    (expected,) = torch.autograd.grad(oracle(**kwargs)[1].sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_long_chunk_and_many_heads_of_a_group(monkeypatch):
    """The chunk that a GPU has, interpreted."""
    kwargs = call(Maker(torch.float32), 1, 130, H=6, G=2, P=16, N=16, segments=segments([70, 60]))
    names = [n for n in NAMES if n in kwargs]
    expected = run(ki.ssd_scan, kwargs, names, backend="reference")
    monkeypatch.setattr(geometry, "longest_chunk", lambda target, size: 64)
    assert geometry.Sizes.of(kwargs["x"], kwargs["b"]).chunks == 3
    found = run(ki.ssd_scan, kwargs, names, backend="triton")
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


BAD = {
    "x must be [B, T, H, P] with no T, H or P of 0": {"x": torch.ones(2, 0, 4, 8)},
    "x must be a floating-point tensor": {"x": torch.ones(2, 40, 4, 8, dtype=torch.int64)},
    "dt must be [B, T, H] (2, 40, 4), got shape (2, 40, 3)": {"dt": torch.ones(2, 40, 3)},
    "a must be [H] (4,), got shape (2,)": {"a": torch.ones(2)},
    "b must be [B, T, G, N] with G a divisor of 4 heads": {"b": torch.ones(2, 40, 3, 16)},
    "c must be of b's shape": {"c": torch.ones(2, 40, 4, 16)},
    "b must be torch.float32 like x": {"b": torch.ones(2, 40, 2, 16, dtype=torch.bfloat16)},
    "d must be [H]": {"d": torch.ones(4, 8)},
    "dt_softplus must be True or False": {"dt_softplus": 1},
    "segments must be [B or 1, T] = [2 or 1, 40]": {"segments": torch.zeros(3, 40, dtype=torch.int64)},
    "segments must be an integer tensor": {"segments": torch.zeros(2, 40)},
    "state must be [B, H, P, N]": {"state": torch.zeros(2, 4, 8, 8)},
    "chunk must be at least 1": {"chunk": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_what_it_refuses(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ki.ssd_scan(**kwargs_of() | BAD[message])
    assert message in str(error.value)


def test_a_state_that_is_too_wide_is_the_references():
    kwargs = call(Maker(torch.float32), 1, 3, N=130)
    with pytest.raises(ki.Ineligible, match="needs P and N of at most 128"):
        ki.ssd_scan(**kwargs, backend="triton")
    assert ki.ssd_scan(**kwargs).y.shape == kwargs["x"].shape


def test_autocast_casts_x_b_and_c():
    kwargs = kwargs_of()
    with torch.autocast("cpu", torch.bfloat16):
        y, last = ki.ssd_scan(**kwargs)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    lowered = kwargs | {n: kwargs[n].bfloat16() for n in ("x", "b", "c")}
    assert torch.equal(y, ki.ssd_scan(**lowered).y)
