"""``causal_conv1d``: documents, what is not finite, decoding, runs, and refusals."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.kernels.state_space.causal_conv1d.cases import documents, layer
from kernel_index.proofs.errors import run

NAN, INF = float("nan"), float("inf")
BACKENDS = ("triton", "reference")
NAMES = ["x", "weight", "bias", "state"]


def kwargs_of(**more):
    m = Maker(torch.float32)
    found = layer(m, 2, 20, 24, bias=True, state=True)
    return found | {"segments": documents(m, [3, 1, 1, 15], [12, 8]), **more}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_stays_in_its_document(backend, value):
    """The outputs and gradients of other documents and the outputs of earlier tokens have the bits of finite inputs."""
    kwargs = kwargs_of()
    spoiled = kwargs | {"x": kwargs["x"].clone()}
    spoiled["x"][:, 8] = value
    (y,), (d_x, d_state) = run(ki.causal_conv1d, spoiled, ["x", "state"], backend=backend)
    (plain,), (d_plain, d_state_plain) = run(ki.causal_conv1d, kwargs, ["x", "state"], backend=backend)
    assert torch.equal(y[:, :8], plain[:, :8])
    assert torch.equal(y[:, 12:], plain[:, 12:])
    assert not y[:, 8].isfinite().any()
    for at in (slice(0, 5), slice(12, 20)):  # four taps: tokens 5 to 11 are read together with token 8
        assert torch.equal(d_x[:, at], d_plain[:, at])
    assert torch.equal(d_state, d_state_plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_inputs_before_are_the_first_documents(backend):
    kwargs = kwargs_of(state=torch.full((2, 3, 24), NAN), segments=documents(Maker(torch.float32), [1, 19], [2, 18]))
    y = ki.causal_conv1d(**kwargs, backend=backend)
    assert y[0, :1].isnan().all()
    assert y[1, :2].isnan().all()
    assert y[0, 1:].isfinite().all()
    assert y[1, 2:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [(20,), (7, 13), (1,) * 20, (2, 1, 17)])
def test_a_state_continues_a_row(backend, steps):
    kwargs = kwargs_of(segments=None)
    x, before, at = kwargs["x"], kwargs["state"], 0
    whole, pieces = ki.causal_conv1d(**kwargs, backend=backend), []
    for n in steps:
        piece = kwargs | {"x": x[:, at : at + n], "state": before}
        pieces.append(ki.causal_conv1d(**piece, backend=backend))
        before, at = torch.cat([before, x[:, at : at + n]], 1)[:, -3:], at + n
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
def test_runs_meet(T, monkeypatch):
    """Rows of one run, of two, and with fewer programs than runs."""
    from kernel_index.kernels.state_space.causal_conv1d import triton

    monkeypatch.setattr(triton, "processors", lambda _: 1)
    m = Maker(torch.float32)
    for more in ({}, {"state": True}, {"segments": documents(m, [1, T - 1] if T > 1 else [1])}):
        kwargs = layer(m, 2, T, 5, bias=True, **more)
        names = [n for n in NAMES if n in kwargs]
        found = run(ki.causal_conv1d, kwargs, names, backend="triton")
        expected = run(ki.causal_conv1d, kwargs, names, backend="reference")
        for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_a_row_is_read_once(monkeypatch):
    """In runs of 128 tokens, as on a GPU: beside them three rows before each run, and backward five after it."""
    from kernel_index.kernels.state_space.causal_conv1d import triton
    from kernel_index.proofs.ratios import both_ways

    monkeypatch.setattr(triton, "processors", lambda _: 1)
    kwargs = layer(Maker(torch.bfloat16), 1, 256, 256)
    forward, backward = both_ways(ki.causal_conv1d, kwargs, ["x", "weight"])
    size = kwargs["x"].numel() * 2
    assert forward.launches == 1
    assert backward.launches == 2
    assert forward.others == backward.others == forward.atomics == backward.atomics == 0
    assert forward.sectors <= 1.05 * 2 * size
    assert backward.counts[0].sectors <= 1.15 * 3 * size, "with partial sums, which weigh at two runs"


BAD = {
    "x must be [B, T, C] with at least one token": {"x": torch.ones(2, 0, 24)},
    "weight must be [C, W] with C = 24 and W of at least 1": {"weight": torch.ones(4, 24)},
    "bias must be [C] (24,)": {"bias": torch.ones(1)},
    "state must be [B, W − 1, C] (2, 3, 24)": {"state": torch.ones(2, 4, 24)},
    "activation must be one of 'silu', None, got 'relu'": {"activation": "relu"},
    "segments must be [B or 1, T] = [2 or 1, 20]": {"segments": torch.zeros(2, 19, dtype=torch.int64)},
    "segments must be an integer tensor": {"segments": torch.zeros(2, 20)},
}


@pytest.mark.parametrize("message", BAD)
def test_what_it_refuses(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ki.causal_conv1d(**kwargs_of() | BAD[message])
    assert message in str(error.value)
