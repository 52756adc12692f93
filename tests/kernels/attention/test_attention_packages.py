"""What is handed to flash-attn-4 and to varlen_attn, which need CUDA: the reference plays their contracts."""

import itertools
import sys
import types

import pytest
import torch
from hypothesis import assume, given, settings

import kernel_index as ki
from kernel_index.core.target import Target, has_package, pretend
from kernel_index.core.testing import Maker
from kernel_index.kernels.attention.dense_attention import gpu_rules
from kernel_index.kernels.attention.dense_attention.cases import qkv
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall
from kernel_index.kernels.attention.dense_attention.fa4 import attention_fa4
from kernel_index.kernels.attention.dense_attention.gpu_rules import _packing_rule
from kernel_index.kernels.attention.dense_attention.varlen import attention_varlen
from tests.masks.contracts import calls

MANY = settings(max_examples=150, deadline=None, derandomize=True)


def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap, learnable_sink, return_lse, deterministic):
    """Bottom-right, None for no window; a -1 is a length of its own, as in the package."""
    assert return_lse
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert all(side is None or side >= 0 for side in window_size)
    mask = ki.MaskContract(causal, window_size)
    options = {"scale": softmax_scale, "softcap": softcap, "sink": learnable_sink}
    return ki.attention_with_lse(q, k, v, mask, **options, backend="reference")


def by_sequence(attend, q, k, v, cu_q, cu_k):
    assert len(cu_q) > 1, "a kernel is not asked for nothing"
    outs = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        out, lse = attend(q[None, a:b], k[None, c:d], v[None, c:d])
        outs.append((out[0], lse[0]))
    return torch.cat([o for o, _ in outs]), torch.cat([x for _, x in outs], 1)


def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **how):
    assert (max_seqlen_q, max_seqlen_k) == tuple(max([0, *c.diff().tolist()]) for c in (cu_seqlens_q, cu_seqlens_k))
    return by_sequence(lambda *x: flash_attn_func(*x, **how), q, k, v, cu_seqlens_q, cu_seqlens_k)


def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    mask = ki.MaskContract(False, window_size)

    def attend(*x):
        return ki.attention_with_lse(*x, mask, scale=scale, backend="reference")

    return by_sequence(attend, q, k, v, cu_q, cu_k)[0]


def drawn(call):
    """A drawn contract that packed lengths can express, and its inputs."""
    mask, rows, queries, keys = call
    inputs = qkv(Maker(torch.float64, seed=queries), rows, queries, keys, 4, 2, 4)
    assume(
        _packing_rule(AttentionCall(**inputs, mask=mask, scale=None, softcap=0.0, sink=None, with_lse=False)) is None
    )
    return mask, inputs


def compare(actual, expected, leaves):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.manual_seed(3)
    up = torch.randn_like(expected)
    for a, e in zip(*(torch.autograd.grad(o, leaves, up) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_fa4_is_told_what_the_contract_says(monkeypatch):
    cute = types.ModuleType("flash_attn.cute")
    cute.flash_attn_func, cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)

    @MANY
    @given(calls(max_rows=2))
    def check(call):
        mask, inputs = drawn(call)
        leaves = [x.requires_grad_() for x in inputs.values()]
        out, lse = attention_fa4(AttentionCall(*leaves, mask, None, 2.0, None, True))
        expected = ki.attention_with_lse(*leaves, mask, softcap=2.0, backend="reference")
        assert out.is_contiguous()
        assert lse.is_contiguous()
        torch.testing.assert_close(lse, expected.lse, check_dtype=False)
        compare(out, expected.out, leaves)

    check()


def test_varlen_is_told_what_the_contract_says(monkeypatch):
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)

    @MANY
    @given(calls(max_rows=2))
    def check(call):
        mask, inputs = drawn(call)
        leaves = [x.requires_grad_() for x in inputs.values()]
        actual, _ = attention_varlen(AttentionCall(*leaves, mask, 0.3, 0.0, None, False))
        compare(actual, ki.attention(*leaves, mask, scale=0.3, backend="reference"), leaves)

    check()


def test_fa4_takes_calls_that_need_gradients_of_packed_documents(monkeypatch):
    """Where lists of tiles were not tried, ``auto`` passes over it: reading the lengths waits for the device."""
    monkeypatch.setattr(gpu_rules, "fa4_package_why_not", lambda: None)
    q, k, v = (torch.empty(1, 64, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    ids = ki.MaskContract(doc_ids=torch.zeros(1, 64, dtype=torch.int64, device="meta"))
    with pretend(Target("cuda", 100)):
        call = AttentionCall(q, k, v, ids, None, 0.0, None, False)
        assert gpu_rules.fa4_why_not(call) is None
        assert gpu_rules.fa4_not_worth(call) == gpu_rules.WAITS


def test_fa4_declines_gradients_of_packed_documents_that_were_not_found_right(monkeypatch):
    monkeypatch.setattr(gpu_rules, "fa4_package_why_not", lambda: None)
    ids = ki.MaskContract(doc_ids=torch.zeros(1, 64, dtype=torch.int64, device="meta"))

    def reason(width: int, mask: ki.MaskContract, softcap: float = 0.0, grad: bool = True) -> str | None:
        kind = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": grad}
        q, k, v = (torch.empty(1, 64, 2, width, **kind) for _ in range(3))
        return gpu_rules.fa4_why_not(AttentionCall(q, k, v, mask, None, softcap, None, False))

    with pretend(Target("cuda", 100)):
        assert reason(8, ids) == gpu_rules.NOT_COMPARED
        assert reason(80, ids) == gpu_rules.NOT_COMPARED
        assert reason(64, ids, softcap=20.0) is None
        assert reason(8, ids, grad=False) is None
        assert reason(8, ki.MaskContract()) is None


LENGTHS = {
    "equal": [512] * 4,
    "uneven": [300, 700, 24, 1024],
    "around tiles": [1, 127, 129, 1000, 791],
    "many": [16] * 128,
}


on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_package("flash_attn"), reason="needs a CUDA device and flash-attn-4"
)


@on_a_gpu
@pytest.mark.parametrize("width", [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_the_package_called_directly(width, softcap):
    """Which gradients of packed lengths are right, in the package's own function: those of PACKED_WIDTHS alone."""
    from flash_attn.cute import flash_attn_varlen_func

    m, lengths = Maker(torch.bfloat16, device="cuda"), [7, 6, 300, 13]
    leaves = [m.normal(sum(lengths), heads, width).requires_grad_() for heads in (4, 2, 2)]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    sizes = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    out = flash_attn_varlen_func(*leaves, cu_seqlens_q=cu, cu_seqlens_k=cu, **sizes, causal=True, softcap=softcap)[0]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()[None]
    exact = [x.detach().float()[None].requires_grad_() for x in leaves]
    want = ki.attention(*exact, ki.MaskContract(doc_ids=ids), softcap=softcap, backend="reference")
    up = m.normal(*out.shape)
    found = [out, *torch.autograd.grad(out, leaves, up)]
    right = [want, *torch.autograd.grad(want, exact, up.float()[None])]
    errors = [((a.float() - e[0]).norm() / e.norm()).item() for a, e in zip(found, right, strict=True)]
    assert (max(errors) <= torch.finfo(torch.bfloat16).eps) == (width in gpu_rules.PACKED_WIDTHS), errors


@on_a_gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_sinks_and_their_gradient_are_right(width, window, softcap):
    m = Maker(torch.bfloat16, device="cuda")
    leaves = [m.normal(2, 700, heads, width).requires_grad_() for heads in (8, 2, 2)]
    sink = m.normal(8, dtype=torch.float32).requires_grad_()
    mask = ki.MaskContract(window=None if window is None else (window, 0))
    up, results = m.normal(2, 700, 8, width), []
    for inputs, backend in (([*leaves, sink], "fa4"), ([x.detach().float() for x in (*leaves, sink)], "reference")):
        inputs = [x.requires_grad_() for x in inputs]
        out = ki.attention(*inputs[:3], mask, softcap=softcap, sink=inputs[3], backend=backend)
        results.append([out, *torch.autograd.grad(out, inputs, up.to(out.dtype))])
    for actual, exact in zip(*results, strict=True):
        assert (actual.float() - exact).norm() / exact.norm() <= torch.finfo(torch.bfloat16).eps


@on_a_gpu
@pytest.mark.parametrize("window", [(None, 0), (128, 0), (None, None)], ids=["causal", "window", "full"])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128)], ids=["4/4 of 64", "8/2 of 128"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gradients_of_packed_documents_are_right(lengths, heads, window):
    """flash-attn-4 itself, on its device: output, log-sum-exp and all gradients against the reference in float32."""
    query_heads, kv_heads, width = heads
    tokens = sum(lengths)
    m = Maker(torch.bfloat16, device="cuda")
    leaves = [m.normal(1, tokens, n, width).requires_grad_() for n in (query_heads, kv_heads, kv_heads)]
    exact_leaves = [x.detach().float().requires_grad_() for x in leaves]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()[None]
    mask = ki.MaskContract(window[1] == 0, (window[0], None), ids)
    up, up_lse = m.normal(1, tokens, query_heads, width), m.normal(1, query_heads, tokens, dtype=torch.float32)
    for lse_gradient in (False, True):
        results = []
        for inputs, backend in ((leaves, "fa4"), (exact_leaves, "reference")):
            out, lse = ki.attention_with_lse(*inputs, mask, backend=backend)
            loss = (out.float() * up.float()).sum() + ((lse * up_lse).sum() if lse_gradient else 0.0)
            results.append([out, lse, *torch.autograd.grad(loss, inputs)])
        for actual, exact in zip(*results, strict=True):
            error = (actual.float() - exact).norm() / exact.norm()
            assert error <= torch.finfo(torch.bfloat16).eps
