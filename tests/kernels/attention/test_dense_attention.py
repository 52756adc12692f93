"""Attention under random contracts, packed documents, empty rows, and what each backend says about itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.kernels.attention.dense_attention import sdpa as sdpa_module
from kernel_index.kernels.attention.dense_attention.cases import oracle_with_lse, qkv
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from tests.masks.contracts import calls

BACKENDS = ["reference", "sdpa", "cpu"]
HAS_LSE = ["reference", "cpu"]


def gradients(outputs, inputs):
    torch.manual_seed(3)
    ups = [torch.randn_like(o) for o in outputs]
    return torch.autograd.grad(outputs, inputs, ups)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_contracts_against_the_float64_oracle(backend):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(calls(max_rows=2), st.sampled_from([(4, 2), (2, 2), (3, 1)]))
    def check(call, heads):
        mask, rows, queries, keys = call
        inputs = qkv(Maker(torch.float64, seed=queries), rows, queries, keys, *heads, 4, 3)
        leaves = [x.requires_grad_() for x in inputs.values()]
        out, _ = oracle_with_lse(**inputs, mask=mask)
        actual = ki.attention(**inputs, mask=mask, backend=backend)
        torch.testing.assert_close(actual, out, rtol=1e-9, atol=1e-9)
        for a, e in zip(gradients([actual], leaves), gradients([out], leaves), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)

    check()


@pytest.mark.parametrize("backend", HAS_LSE)
def test_random_contracts_with_lse_softcap_and_sink(backend):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(calls(max_rows=2), st.sampled_from([0.0, 1.5]), st.booleans())
    def check(call, softcap, with_sink):
        mask, rows, queries, keys = call
        m = Maker(torch.float64, seed=queries)
        inputs = qkv(m, rows, queries, keys, 4, 2, 4) | ({"sink": m.normal(4)} if with_sink else {})
        leaves = [x.requires_grad_() for x in inputs.values()]
        expected = oracle_with_lse(**inputs, mask=mask, softcap=softcap)
        actual = ki.attention_with_lse(**inputs, mask=mask, softcap=softcap, backend=backend)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
        for a, e in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)

    check()


# --- packed documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(None, None), (7, 0)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_are_the_documents_alone(backend, causal, window):
    """A | B in one row gives the outputs and the gradients of A and of B, the padding behind them zero."""
    lengths = (19, 14)
    m = Maker(torch.float64)
    tensors = [x.requires_grad_() for x in qkv(m, 1, 36, 36, 4, 2, 8).values()]
    ids = torch.tensor([[4] * 19 + [9] * 14 + [-1] * 3])
    up = m.normal(1, 36, 4, 8)
    packed_out = ki.attention(*tensors, ki.MaskContract(causal, window, ids), backend=backend)
    packed_grads = torch.autograd.grad(packed_out, tensors, up)
    begin = 0
    for length in lengths:
        piece = slice(begin, begin + length)
        alone = [x.detach()[:, piece].clone().requires_grad_() for x in tensors]
        out = ki.attention(*alone, ki.MaskContract(causal, window), backend=backend)
        grads = torch.autograd.grad(out, alone, up[:, piece])
        torch.testing.assert_close(packed_out[:, piece], out, rtol=1e-12, atol=1e-12)
        for joint, single in zip(packed_grads, grads, strict=True):
            torch.testing.assert_close(joint[:, piece], single, rtol=1e-12, atol=1e-12)
        begin += length
    for x in (packed_out, *packed_grads):
        assert not x[:, begin:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_does_not_notice_the_others(backend):
    mask = ki.MaskContract(doc_ids=packed(26))
    inputs = qkv(Maker(torch.float32), 2, 26, 26, 2, 2, 8)
    before = ki.attention(**inputs, mask=mask, backend=backend)
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[0, 5:8] += 100.0  # the third document of the first row
    after = ki.attention(**changed, mask=mask, backend=backend)
    same = torch.ones(2, 26, dtype=torch.bool)
    same[0, 5:8] = False
    assert torch.equal(after[same], before[same])
    assert not torch.equal(after[0, 5:8], before[0, 5:8])


# --- empty rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_give_exact_zeros(backend, dtype, with_sink):
    if with_sink and backend not in HAS_LSE:
        with pytest.raises(ki.Ineligible, match="no sink"):
            ki.attention(*qkv(Maker(dtype), 1, 2, 2, 2, 2, 8).values(), sink=torch.zeros(2), backend=backend)
        return
    mask = ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[0, 3]))
    inputs = qkv(Maker(dtype, scale=30.0), 2, 5, 5, 4, 2, 8)
    if with_sink:
        inputs["sink"] = torch.tensor([0.0, 5.0, -90.0, 90.0])
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = ki.attention(**inputs, mask=mask, backend=backend)
    empty = ~dense_oracle(mask, 2, 5, 5).any(-1)
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    assert out[~empty].any()
    dq, dk, dv, *dsink = gradients([out], leaves)
    for grad in (dq, dk, dv, *dsink):
        assert torch.isfinite(grad).all()
    assert not dq[empty].any()
    assert not dk[0].any()
    assert not dv[0].any()
    assert not dv[1, 3:].any()


@pytest.mark.parametrize("backend", HAS_LSE)
def test_the_lse_of_an_empty_row_is_minus_infinity_with_gradient_zero(backend):
    mask = ki.MaskContract(doc_ids=torch.tensor([[1, -1, 2]]))
    inputs = qkv(Maker(torch.float32), 1, 3, 3, 2, 2, 8) | {"sink": torch.tensor([1.0, 2.0])}
    leaves = [x.requires_grad_() for x in inputs.values()]
    lse = ki.attention_with_lse(**inputs, mask=mask, backend=backend).lse
    assert lse.isneginf().tolist() == [[[False, True, False]] * 2]
    dq, _, dv, _ = torch.autograd.grad(lse, leaves, torch.ones_like(lse), materialize_grads=True)
    assert torch.isfinite(dq).all()
    assert not dq[0, 1].any()
    assert not dv.any()


@pytest.mark.parametrize("backend", HAS_LSE)
def test_every_row_empty(backend):
    inputs = qkv(Maker(torch.float32), 2, 3, 0, 2, 1, 8)
    out, lse = ki.attention_with_lse(**inputs, backend=backend)
    assert not out.any()
    assert lse.isneginf().all()


# --- LSE, sink, softcap, scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", HAS_LSE)
def test_the_lse_includes_the_sink(backend):
    inputs = qkv(Maker(torch.float32), 2, 6, 6, 4, 2, 8)
    sink = torch.tensor([0.5, -1.0, 3.0, 0.0])
    out, lse = ki.attention_with_lse(**inputs, backend=backend)
    with_sink = ki.attention_with_lse(**inputs, sink=sink, backend=backend)
    expected = torch.logaddexp(lse, sink[None, :, None])
    torch.testing.assert_close(with_sink.lse, expected)
    share = torch.exp(lse - expected).transpose(1, 2)[..., None]
    torch.testing.assert_close(with_sink.out, out * share)
    assert with_sink.lse.dtype == torch.float32
    assert with_sink.lse.is_contiguous()


@pytest.mark.parametrize("backend", HAS_LSE)
def test_the_lse_is_float32_whatever_the_input(backend):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out, lse = ki.attention_with_lse(**qkv(Maker(dtype), 1, 3, 3, 2, 2, 8), backend=backend)
        assert (out.dtype, lse.dtype) == (dtype, expected)


@pytest.mark.parametrize("backend", HAS_LSE)
def test_softcap_bounds_the_scores(backend):
    inputs = qkv(Maker(torch.float32, scale=1.0), 1, 6, 6, 2, 2, 8)
    inputs["q"] *= 1e4
    out = ki.attention(**inputs, mask=ki.MaskContract(causal=False), softcap=1e-6, backend=backend)
    torch.testing.assert_close(out, inputs["v"].mean(1, keepdim=True).expand_as(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_one_over_the_root_of_the_head_size(backend):
    inputs = qkv(Maker(torch.float32), 1, 6, 6, 2, 2, 16)
    plain = ki.attention(**inputs, backend=backend)
    torch.testing.assert_close(ki.attention(**inputs, scale=0.25, backend=backend), plain)
    assert not torch.allclose(ki.attention(**inputs, scale=0.5, backend=backend), plain)
    averaged = ki.attention(**inputs, scale=0.0, mask=ki.MaskContract(causal=False), backend=backend)
    torch.testing.assert_close(averaged, inputs["v"].mean(1, keepdim=True).expand_as(averaged))


# --- what ran ------------------------------------------------------------------------------------------------------


def lowering(queries, keys, mask) -> str:
    q, k = torch.zeros(1, queries, 2, 8), torch.zeros(1, keys, 2, 8)
    with ki.receipts() as log:
        ki.attention(q, k, k, mask, backend="sdpa")
    return log[0].details["mask_lowering"]


def test_the_receipt_says_what_torch_was_given():
    assert lowering(6, 6, ki.MaskContract()) == "is_causal"
    assert lowering(6, 6, ki.MaskContract(window=(-1, 0))) == "is_causal"
    assert lowering(6, 6, ki.MaskContract(window=(5, 3))) == "is_causal", "a window as long as the row is no window"
    assert lowering(6, 6, ki.MaskContract(window=(4, 0))) == "dense"
    assert lowering(1, 6, ki.MaskContract()) == "none", "the last query sees every key"
    assert lowering(2, 6, ki.MaskContract(q_offset=5)) == "none"
    assert lowering(3, 6, ki.MaskContract()) == "dense", "torch's flag is aligned top-left"
    assert lowering(3, 6, ki.MaskContract(q_offset=0)) == "dense"
    assert lowering(6, 6, ki.MaskContract(q_offset=1)) == "dense"
    assert lowering(6, 4, ki.MaskContract()) == "dense"
    assert lowering(6, 6, ki.MaskContract(causal=False)) == "none"
    assert lowering(6, 6, ki.MaskContract(causal=False, window=(-1, 0))) == "is_causal"
    assert lowering(6, 6, ki.MaskContract(doc_ids=torch.zeros(1, 6, dtype=torch.int64))) == "dense"
    assert lowering(6, 6, ki.MaskContract(validity=ki.attention_validity())) == "is_causal"
    assert lowering(6, 6, ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[6]))) == "dense"


def test_sdpa_says_why_it_cannot():
    q = torch.zeros(1, 4, 2, 8)
    for extra, reason in (({"softcap": 1.0}, "no softcap"), ({"sink": torch.zeros(2)}, "no sink")):
        with pytest.raises(ki.Ineligible, match=reason):
            ki.attention(q, q, q, **extra, backend="sdpa")
        with ki.receipts() as log:
            ki.attention(q, q, q, **extra)
        assert reason in dict(log[0].declined)["sdpa"]
        assert log[0].ran != "sdpa"
    with pytest.raises(ki.Ineligible, match="returns no log-sum-exp"):
        ki.attention_with_lse(q, q, q, backend="sdpa")


def test_sdpa_refuses_a_dense_mask_above_8192_queries():
    q = torch.empty(1, 8193, 1, 8, device="meta")
    local = ki.MaskContract(window=(16, 0))
    assert "dense_mask_too_large" in ki.explain(ki.attention, q, q, q, local).verdicts["sdpa"]
    assert ki.explain(ki.attention, q, q, q).verdicts["sdpa"] is None
    short = torch.empty(1, 8192, 1, 8, device="meta")
    assert ki.explain(ki.attention, short, short, short, local).verdicts["sdpa"] is None


# --- what it costs -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= t.numel() * t.element_size():
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])  # which refuses a dispatch mode
def test_keys_and_values_are_not_repeated(backend):
    q, k = torch.zeros(1, 1, 16, 64), torch.zeros(1, 500, 2, 64)
    with Largest() as seen:
        ki.attention(q, k, k, backend=backend)
    assert seen.numel <= k.numel()


def test_layers_that_share_a_contract_build_one_dense_mask(monkeypatch):
    built = []
    real = sdpa_module._open_mask
    monkeypatch.setattr(sdpa_module, "_open_mask", lambda *a: built.append(a) or real(*a))
    ids = packed(13)
    mask = ki.MaskContract(doc_ids=ids)
    x = qkv(Maker(torch.float32), 2, 13, 13, 2, 2, 8)
    first = ki.attention(**x, mask=mask, backend="sdpa")
    for _ in range(11):
        ki.attention(**x, mask=mask, backend="sdpa")
    assert len(built) == 1
    ids[:, 6:] = 3  # changed in place: built again, and the result differs
    assert not torch.equal(ki.attention(**x, mask=mask, backend="sdpa"), first)
    assert len(built) == 2
