"""A decoding step like an earlier one skips checks and choice: same results, same errors, and no step that differs.

The CPU plays the GPU here, and the interpreter runs the launches.
"""

import contextlib

import pytest
import torch

import kernel_index as ki
from kernel_index.core import settled
from kernel_index.kernels.attention.dense_fa4_kvcache_decode import contract, torch_op_repeated

pytest.importorskip("triton")

H, K, D, PAGE = 4, 2, 16, 8


def a_step(length=5, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    call = {
        "q": torch.randn(2, 1, H, D, generator=g),
        "k_cache": torch.randn(6, PAGE, K, D, generator=g),
        "v_cache": torch.randn(6, PAGE, K, D, generator=g),
        "cache_seqlens": torch.tensor([length, 1], dtype=torch.int32),
        "k": torch.randn(2, 1, K, D, generator=g),
        "v": torch.randn(2, 1, K, D, generator=g),
        "block_table": torch.tensor([[5, 2], [1, 0]], dtype=torch.int32),
        "backend": "triton",
    }
    return call | changes


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors of the CPU count as a GPU's."""
    monkeypatch.setattr(settled, "FIRST_GPU", -1)
    monkeypatch.setattr(torch_op_repeated, "_KNOWN", {})


@pytest.fixture
def checked(on_a_gpu, monkeypatch):
    """The calls that go the long way."""
    found, check = [], contract.check
    monkeypatch.setattr(contract, "check", lambda *args: found.append(args) or check(*args))
    return found


def decode(call):
    """The output, and the cache after it."""
    call = call | {name: call[name].clone() for name in ("k_cache", "v_cache")}
    return ki.fa4_kvcache_decode(**call), call["k_cache"], call["v_cache"]


def test_only_the_first_of_many_steps_is_checked(checked):
    for length in range(5, 9):
        found = decode(a_step(length, seed=length))
        assert len(checked) == 1
        expected = decode(a_step(length, seed=length, backend="reference"))
        checked.pop()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_the_cache_is_marked_as_written(on_a_gpu):
    call = a_step()
    for expected in (1, 2):
        ki.fa4_kvcache_decode(**call)
        assert call["k_cache"]._version == call["v_cache"]._version == expected


def other(name):
    """A call that differs in one thing from ``a_step``."""
    call = a_step()
    strided = torch.stack([call["q"], call["q"]], -1)[..., 0]
    return call | {
        "more rows of pages": {"block_table": torch.tensor([[5, 2, 3], [1, 0, 4]], dtype=torch.int32)},
        "lengths of 64 bits": {"cache_seqlens": call["cache_seqlens"].long()},
        "a window": {"window_size": (2, 0)},
        "a softcap": {"softcap": 1.5},
        "a scale": {"scale": 0.5},
        "a sink": {"sink": torch.ones(H)},
        "not causal": {"causal": False},
        "another dtype": {n: call[n].bfloat16() for n in ("q", "k", "v", "k_cache", "v_cache")},
        "strided queries": {"q": strided},
        "nothing new": {"k": None, "v": None},
        "auto": {"backend": "auto"},
    }[name]  # fmt: skip


OTHERS = (
    "more rows of pages", "lengths of 64 bits", "a window", "a softcap", "a scale", "a sink", "not causal",
    "another dtype", "strided queries", "nothing new", "auto",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_step_is_checked_anew_and_right(checked, name):
    decode(a_step())
    call = other(name)
    eps = torch.finfo(call["q"].dtype).eps
    for _ in range(2):
        found = decode(call)
        expected = decode(call | {"backend": "reference"})
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=64 * eps, atol=32 * eps)
    assert len(checked) >= 3


WRONG = {
    "causal must be": {"causal": 1},
    "softcap must be a number": {"softcap": False},
    "scale must be a number": {"scale": True},
    "scale must be finite": {"scale": float("nan")},
    "window.0. must be an integer": {"window_size": ([1], 0)},
    "q must be": {"q": [1.0]},
    "k must be given": {"k": None},
    "cache_seqlens must be an integer": {"cache_seqlens": torch.ones(2)},
    "one length for each row": {"cache_seqlens": torch.tensor([5], dtype=torch.int32)},
    "without gradients": {"k_cache": torch.randn(6, PAGE, K, D).requires_grad_()},
    "multiple of k_cache's": {"q": torch.randn(2, 1, 3, D)},
    "expected auto or one of": {"backend": "cuda-magic"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_after_a_good_step_too(on_a_gpu, message):
    ki.fa4_kvcache_decode(**a_step())
    with pytest.raises((TypeError, ValueError), match=message):
        ki.fa4_kvcache_decode(**(a_step() | WRONG[message]))


def test_gradients_are_refused_after_a_good_step_too(on_a_gpu):
    ki.fa4_kvcache_decode(**a_step())
    with pytest.raises(ki.Ineligible, match="backward"):
        ki.fa4_kvcache_decode(**a_step(q=torch.randn(2, 1, H, D, requires_grad=True)))


def test_a_cache_with_a_gradient_is_refused_without_grad_mode_too(on_a_gpu):
    with torch.no_grad():
        ki.fa4_kvcache_decode(**a_step())
        with pytest.raises(ValueError, match="without gradients"):
            ki.fa4_kvcache_decode(**a_step(k_cache=torch.randn(6, PAGE, K, D, requires_grad=True)))


def test_a_learned_sink_goes_the_short_way_where_no_gradient_is_recorded(checked):
    with torch.no_grad():
        for _ in range(3):
            ki.fa4_kvcache_decode(**a_step(sink=torch.nn.Parameter(torch.ones(H))))
    assert len(checked) == 1


def test_receipts_force_explain_autocast_and_numerics_go_the_long_way(checked):
    call = a_step()
    ki.fa4_kvcache_decode(**call)
    with ki.receipts() as log:
        ki.fa4_kvcache_decode(**call)
    assert [r.ran for r in log] == ["triton"]
    assert ki.explain("fa4_kvcache_decode", **call).would_run == "triton"
    with ki.force("reference"):
        ki.fa4_kvcache_decode(**call)
    with torch.profiler.profile() as found:
        ki.fa4_kvcache_decode(**call)
    assert "ki.fa4_kvcache_decode[triton]" in [e.key for e in found.key_averages()]
    assert len(checked) == 5
    with contextlib.suppress(ki.Ineligible), ki.numerics("invariant"):  # a CPU without AVX-512 has no form of it
        ki.fa4_kvcache_decode(**call)
    ki.fa4_kvcache_decode(**call)
    assert len(checked) == 6
