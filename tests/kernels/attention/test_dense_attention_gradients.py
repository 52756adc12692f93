"""More of what attention promises: rows, packing and errors."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.kernels.attention.dense_attention import reference as reference_module
from kernel_index.kernels.attention.dense_attention.cases import qkv
from kernel_index.masks.doc_window_mask.cases import packed
from tests.kernels.attention.test_dense_attention import Largest


def test_the_reference_takes_long_calls_in_chunks(monkeypatch):
    x = qkv(Maker(torch.float32), 2, 40, 50, 4, 2, 8)
    mask = ki.MaskContract(window=(9, 0), doc_ids=packed(50))
    whole = ki.attention_with_lse(**x, mask=mask, backend="reference")
    monkeypatch.setattr(reference_module, "SCORES_AT_ONCE", 2 * 4 * 50 * 7)
    with torch.no_grad(), Largest() as seen:
        parts = ki.attention_with_lse(**x, mask=mask, backend="reference")
    assert seen.numel <= 2 * 4 * 50 * 7
    for a, e in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, e)
        assert a.is_contiguous()


def test_a_last_dimension_that_is_not_dense_keeps_torch_on_its_fused_kernel():
    x = {name: t.requires_grad_() for name, t in qkv(Maker(torch.float32), 1, 9, 9, 2, 2, 8).items()}
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in x.items()}
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profile:
        ki.attention(**strided, backend="sdpa")
    names = {e.name for e in profile.events()}
    assert any("flash_attention" in n for n in names), names


# --- arguments -----------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
BAD = [
    ((Q[0], K, K), {}, ValueError, "q must be [B, T, H, D], got shape (3, 4, 8)"),
    ((Q.long(), K, K), {}, TypeError, "q must be a floating-point tensor, got torch.int64"),
    ((Q, [1], K), {}, TypeError, "k must be a torch.Tensor, got list"),
    ((Q, K.double(), K), {}, TypeError, "k must be torch.float32 like q, got torch.float64"),
    ((Q, K, K.bfloat16()), {}, TypeError, "v must be torch.float32 like q, got torch.bfloat16"),
    ((Q, K.to("meta"), K), {}, ValueError, "k must be on the device of q (cpu), got meta"),
    (
        (Q, K[:1], K[:1]),
        {},
        ValueError,
        "k must be [B, S, K, D] with q's B and D, (2, 5, 2, 8), got shape (1, 5, 2, 8)",
    ),
    ((Q, K[..., :4], K), {}, ValueError, "k must be [B, S, K, D] with q's B and D,"),
    (
        (Q, K, K[:, :4]),
        {},
        ValueError,
        "v must be [B, S, K, Dv] with k's B, S and K, (2, 5, 2, 8), got shape (2, 4, 2, 8)",
    ),
    ((Q, K, K[:, :, :1]), {}, ValueError, "v must be [B, S, K, Dv]"),
    ((Q[:, :, :3], K, K), {}, ValueError, "q must be of a multiple of k's 2 heads, got 3"),
    ((Q, K[:, :, :0], K[:, :, :0]), {}, ValueError, "q must be of a multiple of k's 0 heads, got 4"),
    ((Q[..., :0], K[..., :0], K), {}, ValueError, "q must be of head size at least 1, got shape (2, 3, 4, 0)"),
    ((Q, K, K, None), {}, TypeError, "mask must be a MaskContract, got NoneType"),
    ((Q, K, K, Q.bool()), {}, TypeError, "mask must be a MaskContract, got Tensor"),
    ((Q, K, K), {"scale": "1"}, TypeError, "scale must be a number, got str"),
    ((Q, K, K), {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ((Q, K, K), {"softcap": -1.0}, ValueError, "softcap must be at least 0 (0 is off), got -1.0"),
    ((Q, K, K), {"softcap": None}, TypeError, "softcap must be a number, got NoneType"),
    (
        (Q, K, K),
        {"sink": torch.zeros(2)},
        ValueError,
        "sink must be one logit for each query head, [H] (4,), got shape (2,)",
    ),
    ((Q, K, K), {"sink": torch.zeros(4, dtype=torch.int64)}, TypeError, "sink must be a floating-point tensor"),
    ((Q, K, K), {"sink": torch.zeros(4, device="meta")}, ValueError, "sink must be on the device of q"),
    (
        (Q, K, K, ki.MaskContract(doc_ids=packed(4))),
        {},
        ValueError,
        "kv_len must be 4, the size of doc_ids [B, S], got 5",
    ),
    (
        (Q, K, K, ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[5]))),
        {},
        ValueError,
        "batch_size must be 1, the size of the contract's validity, got 2",
    ),
    ((K, K[:, :3], K[:, :3]), {}, ValueError, "the layout is [B, T, H, D], not SDPA's [B, H, T, D]; give a mask"),
    ((Q, K, K, ki.MaskContract(doc_ids=packed(5).to("meta"))), {}, ValueError, "doc_ids must be on cpu, got meta"),
]


@pytest.mark.parametrize("function", [ki.attention, ki.attention_with_lse])
@pytest.mark.parametrize(("args", "keywords", "kind", "message"), BAD, ids=[m for *_, m in BAD])
def test_what_is_refused(function, args, keywords, kind, message):
    with pytest.raises(kind) as refusal:
        function(*args, **keywords)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_more_queries_than_keys_need_a_mask():
    """Given, it means what it says; without keys there is nothing to mistake."""
    x = torch.ones(2, 5, 2, 8)
    out = ki.attention(x, x[:, :3], x[:, :3], ki.MaskContract())
    assert not out[:, :2].any()
    assert out[:, 2:].any()
    assert not ki.attention(x, x[:, :0], x[:, :0]).any()
    same = torch.compile(ki.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (4, 5):
        torch.testing.assert_close(same(x[:, :tokens], x, x), ki.attention(x[:, :tokens], x, x))


# --- torch.compile -------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Two layers of attention, one of them local, under masks made from the batch inside the compiled forward."""

    def forward(self, x, ids):
        mask = ki.MaskContract(doc_ids=ids)
        local = ki.MaskContract(doc_ids=ids, window=(3, 0))
        x = x + ki.attention(x, x, x, mask)
        return x + ki.attention(x, x, x, local) + ki.attention_with_lse(x, x, x, mask, softcap=3.0).out


@pytest.mark.thorough
def test_a_compiled_model_is_one_graph_over_several_lengths():
    layer = Layer()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 13, 21):
        x = Maker(torch.float32).normal(2, n, 2, 8).requires_grad_()
        actual, expected = compiled(x, packed(n)), layer(x, packed(n))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        (a,), (e,) = (torch.autograd.grad(o.square().sum(), x) for o in (actual, expected))
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.thorough
def test_a_restarted_trace_leaves_one_receipt_and_touches_no_other():
    def call(x, softcap):
        return ki.attention(x, x, x, softcap=softcap)

    x = torch.randn(1, 5, 2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with ki.receipts() as log:
        ki.attention(x, x, x)
        compiled(x, 2.5)  # a Python float that steers a branch: Dynamo starts over
    assert [r.ran for r in log] == ["sdpa", "reference"]
