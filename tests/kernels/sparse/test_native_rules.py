"""Where the native kernels do not run, the next backend does, and the receipt says why."""

import pytest
import torch

from kernel_index.core import native
from kernel_index.core.dispatch import receipts
from kernel_index.core.target import NO_VECTORS
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention


def run(dtype=torch.float32, width=8):
    q, k, v = (torch.randn(1, 300, h, width).to(dtype) for h in (2, 1, 1))
    with receipts() as log:
        block_sparse_attention(q, k, v, torch.zeros(1, 300, 1, 1, dtype=torch.int64), block_size=64)
    return log[0].ran, dict(log[0].declined).get("native")


@pytest.fixture
def able(monkeypatch):
    """A machine that can run native kernels, as far as the rules can see."""
    monkeypatch.setattr(native, "_has_vectors", lambda: True)
    monkeypatch.setattr(native, "has_libraries", lambda: True)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("has_libraries", lambda: False, "needs a C++ compiler (g++ or clang++)"),
        ("_has_vectors", lambda: False, NO_VECTORS),
    ],
)
def test_a_machine_without(name, value, reason, able, monkeypatch):
    monkeypatch.setattr(native, name, value)
    assert run() == ("cpu", reason)


@pytest.mark.native
@pytest.mark.parametrize("instructions", ["AVX512", "AVX2"])
def test_onednn_switched_off(instructions, monkeypatch):
    """The kernels for AVX2 have products of their own."""
    monkeypatch.setattr(native, "vector_instructions", lambda: instructions)
    with torch.backends.mkldnn.flags(enabled=False):
        assert run() == (("cpu", NO_VECTORS) if instructions == "AVX512" else ("native", None))


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.float16, 8, "needs float32 or bfloat16"),
        (torch.float64, 8, "needs float32 or bfloat16"),
        (torch.float32, 7, "needs even head sizes: bfloat16 is multiplied in pairs"),
    ],
)
def test_a_call_that_it_does_not_take(dtype, width, reason, able):
    assert run(dtype, width) == ("cpu", reason)


@pytest.mark.native
def test_where_it_runs():
    assert run() == ("native", None)
