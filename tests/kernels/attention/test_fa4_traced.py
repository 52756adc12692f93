"""flash-attn-4 as an op in a graph: what goes into the package and comes out of it, with a stand-in for the package."""

import math
import sys
from types import ModuleType

import pytest
import torch

import kernel_index as ki
from kernel_index.core.target import has_package
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall
from kernel_index.kernels.attention.dense_attention.torch_op_fa4 import attention_fa4_traced

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_package("flash_attn"), reason="needs a CUDA device and flash-attn-4"
)


def of_package(q, k, v, softmax_scale, softcap, causal, window_size):
    assert causal
    mask = ki.MaskContract(causal=True, window=(window_size[0], 0))
    return ki.attention_with_lse(q, k, v, mask, scale=softmax_scale, softcap=softcap, backend="reference")


@pytest.fixture
def package(monkeypatch):
    def forward(q, k, v, *, return_lse, deterministic, **options):
        assert all(x.isfinite().all() and x.is_contiguous() for x in (k, v))
        return of_package(q, k, v, **options)

    def backward(q, k, v, out, d_out, lse, scale, causal, softcap, *, window_size_left, window_size_right, dlse, **_):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            found = of_package(*leaves, scale, softcap, causal, (window_size_left, window_size_right))
            upstream = d_out, torch.zeros_like(lse) if dlse is None else dlse
            return torch.autograd.grad(found, leaves, upstream)

    cute, interface = ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.interface")
    cute.flash_attn_func, interface._flash_attn_bwd = forward, backward
    for module in (ModuleType("flash_attn"), cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def operands(bad=None):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 20, heads, 16, generator=generator) for heads in (4, 2, 2))
    if bad is not None:
        v[0, bad, 1, 3] = math.nan
    return [x.requires_grad_() for x in (q, k, v)]


def outcome(function, leaves, with_lse):
    out, lse = function(*leaves)
    loss = (out * out.detach().nan_to_num().sin()).sum() + ((lse * lse.detach().cos()).sum() if with_lse else 0.0)
    return [out, lse, *torch.autograd.grad(loss, leaves)]


@interpreted
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize(
    "options", [{}, {"window": (5, 0)}, {"softcap": 3.0}, {"scale": 0.3}], ids=["causal", "window", "softcap", "scale"]
)
def test_the_graph_computes_attention(package, options, with_lse):
    mask = ki.MaskContract(causal=True, window=options.get("window"))
    scoring = options.get("scale"), options.get("softcap", 0.0)

    def traced(q, k, v):
        return attention_fa4_traced(AttentionCall(q, k, v, mask, *scoring, None, True))

    def expected(q, k, v):
        return ki.attention_with_lse(q, k, v, mask, scale=scoring[0], softcap=scoring[1], backend="reference")

    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(
        outcome(compiled, operands(), with_lse), outcome(expected, operands(), with_lse), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@interpreted
def test_what_is_not_finite_is_seen_by_those_that_see_it(package):
    bad = 13

    def traced(q, k, v):
        return attention_fa4_traced(AttentionCall(q, k, v, ki.MaskContract(causal=True), None, 0.0, None, True))

    out, lse, d_q, _, _ = outcome(torch.compile(traced, fullgraph=True, backend="aot_eager"), operands(bad), False)
    for rows in (out[0, :, 2:], d_q[0, :, 2:]):
        assert rows[bad:].isnan().all()
        assert rows[:bad].isfinite().all()
    assert out[1].isfinite().all()
    assert out[0, :, :2].isfinite().all()
    assert lse[0, 2:, bad:].isnan().all()


@on_a_gpu
@pytest.mark.parametrize("bad", [None, 700])
@pytest.mark.parametrize("window", [None, (100, 0)])
def test_a_graph_has_the_values_of_eager_code(window, bad):
    generator, mask = torch.Generator("cuda").manual_seed(3), ki.MaskContract(causal=True, window=window)
    draw = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    q, k, v = (torch.randn(2, 1000, heads, 64, **draw) for heads in (8, 2, 2))
    if bad is not None:
        v[0, bad, 1, 3] = math.nan

    def run(q, k, v):
        return ki.attention_with_lse(q, k, v, mask, backend="fa4")

    found = []
    for function in (run, torch.compile(run, fullgraph=True)):
        out, lse = function(*(leaves := [x.clone().requires_grad_() for x in (q, k, v)]))
        found.append([out, lse, *torch.autograd.grad((out.float() * out.detach().nan_to_num()).sum(), leaves)])
    for i, (eager, graph) in enumerate(zip(*found, strict=True)):
        # Sums of gradients come in any order: their last bit in bfloat16 may differ.
        near = {"rtol": 0.0, "atol": 0.0} if i < 2 else {"rtol": 2.0**-7, "atol": 1e-4}
        torch.testing.assert_close(graph, eager, equal_nan=True, **near)
