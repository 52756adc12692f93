"""What each backend of attention adds to the common promises: rectangles, tiles, skipped work, refusals."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.testing import Maker
from kernel_index.kernels.attention.dense_attention import contract, gpu_rules, rectangles
from kernel_index.kernels.attention.dense_attention.api import BACKENDS
from kernel_index.kernels.attention.dense_attention.cases import oracle_with_lse, qkv
from kernel_index.kernels.attention.dense_attention.rectangles import rectangles_of
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from tests.masks.contracts import calls


def gradients(outputs, inputs):
    torch.manual_seed(3)
    return torch.autograd.grad(outputs, inputs, [torch.randn_like(o) for o in outputs])


def check_against_oracle(call, heads, softcap, with_sink, dtype, backend, tolerance, widths=(4, 3)):
    """Outputs, log-sum-exp and gradients of a drawn contract; what belongs to an empty row is exactly 0 or −∞."""
    mask, rows, queries, keys = call
    m = Maker(torch.float64, seed=queries)
    inputs = qkv(m, rows, queries, keys, *heads, *widths)
    if with_sink:
        inputs["sink"] = m.normal(heads[0])
    exact = [x.clone().requires_grad_() for x in inputs.values()]
    expected = oracle_with_lse(**dict(zip(inputs, exact, strict=True)), mask=mask, softcap=softcap)
    leaves = [x.to(dtype).requires_grad_() for x in inputs.values()]
    named = dict(zip(inputs, leaves, strict=True))
    actual = ki.attention_with_lse(**named, mask=mask, softcap=softcap, backend=backend)
    empty = ~dense_oracle(mask, rows, queries, keys).any(-1)
    assert not actual.out[empty].any()
    assert (actual.lse.transpose(1, 2).isneginf().all(-1) == empty).all()
    # The log-sum-exp of an empty row has no gradient: none is sent there.
    sent = [torch.where(empty[:, None], 0.0, o.lse.clamp(min=-1e9)) for o in (actual, ki.AttentionOutput(*expected))]
    grads = gradients([actual.out, sent[0]], leaves)
    for grad in grads:
        assert torch.isfinite(grad).all()
    assert not grads[0][empty].any()
    torch.testing.assert_close(actual.out.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.lse.double(), expected[1], rtol=tolerance, atol=tolerance)
    torch.manual_seed(3)
    ups = [torch.randn_like(o).double() for o in (actual.out, sent[0])]
    for a, e in zip(grads, torch.autograd.grad([expected[0], sent[1]], exact, ups), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


HEADS = st.sampled_from([(4, 2), (2, 2), (3, 1)])


@pytest.mark.parametrize(("queries", "small"), [(3, 1), (4, 12), (256, 128 * 128)])
def test_cpu_random_contracts_in_rectangles_of_any_size(monkeypatch, queries, small):
    """Rows of the property test are short: with rectangles as short, every kind and every join of them occurs."""
    monkeypatch.setattr(rectangles, "QUERIES", queries)
    monkeypatch.setattr(rectangles, "SMALL", small)

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(calls(max_rows=2), HEADS, st.sampled_from([0.0, 1.5]), st.booleans())
    def check(call, heads, softcap, with_sink):
        check_against_oracle(call, heads, softcap, with_sink, torch.float64, "cpu", 1e-9)

    check()


@pytest.mark.parametrize("examples", [5, pytest.param(25, marks=pytest.mark.thorough)])
def test_triton_random_contracts(examples):
    """Interpreted, so few; tiles of 16 rows against at most 40 keys, so that masked, full and skipped steps occur."""

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(calls(max_rows=2), HEADS, st.sampled_from([0.0, 1.5]), st.booleans())
    def check(call, heads, softcap, with_sink):
        check_against_oracle(call, heads, softcap, with_sink, torch.float32, "triton", 2e-5)

    check()


@pytest.mark.parametrize(
    "mask",
    [
        ki.MaskContract(),
        ki.MaskContract(window=(20, 0)),
        ki.MaskContract(False, (7, 30)),
        ki.MaskContract(doc_ids=torch.tensor([[3] * 40 + [1] * 5 + [-1] * 3 + [3] * 32])),
        ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[50])),
    ],
)
def test_triton_with_masked_full_and_skipped_tiles(mask):
    check_against_oracle((mask, 1, 80, 80), (2, 1), 0.0, True, torch.float32, "triton", 5e-5)


@pytest.mark.parametrize("whole", [True, False])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(calls(), st.sampled_from([(3, 1), (4, 12), (256, 128 * 128)]))
def test_pieces_hold_every_query_with_a_key_once_and_say_what_is_allowed(whole, call, sizes):
    mask, rows, queries, keys = call
    before = rectangles.QUERIES, rectangles.SMALL
    rectangles.QUERIES, rectangles.SMALL = sizes
    try:
        found = rectangles_of(mask, mask.sizes(rows, queries, keys), whole=whole)
    finally:
        rectangles.QUERIES, rectangles.SMALL = before
    dense = dense_oracle(mask, rows, queries, keys)
    seen = torch.zeros(rows, queries, dtype=torch.int64)
    held = torch.zeros_like(dense)
    for p in found:
        seen[p.batch, p.q] += 1
        held[p.batch, p.q, p.k] = True
        inside = dense[p.batch, p.q, p.k]
        assert p.k.stop > p.k.start
        if p.kind == "full":
            assert inside.all()
        elif p.kind == "causal":
            assert inside.shape[1] == inside.shape[2]
            assert torch.equal(inside, torch.ones_like(inside).tril())
    assert not (dense & ~held).any()
    assert (seen[dense.any(-1)] == 1).all()
    assert (seen <= 1).all()


def scores(mask: ki.MaskContract, length: int) -> int:
    return sum(
        (p.q.stop - p.q.start) * (p.k.stop - p.k.start) for p in rectangles_of(mask, mask.sizes(1, length), whole=True)
    )


def test_documents_and_windows_cost_what_they_contain():
    length = 16384
    ids = (torch.arange(length) // 1024)[None]
    assert scores(ki.MaskContract(doc_ids=ids), length) == 16 * 1024**2
    assert scores(ki.MaskContract(window=(511, 0)), length) <= length * (512 + rectangles.QUERIES)
    tiny = torch.arange(length)[None] // 7
    assert scores(ki.MaskContract(doc_ids=tiny), length) <= length * 128
    assert len(rectangles_of(ki.MaskContract(doc_ids=tiny), ki.MaskContract().sizes(1, length), whole=True)) <= 200


def test_a_long_packed_batch_stays_small(monkeypatch):
    """Neither the dense mask nor its scores: the largest tensor made is a document's."""
    ids = (torch.arange(8192) // 512)[None]
    q, k, v = (torch.randn(1, 8192, 2, 16) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = ki.attention(q, k, v, ki.MaskContract(doc_ids=ids), backend="cpu")
    assert max(e.self_cpu_memory_usage for e in profile.key_averages()) < 64 * out.numel() * 4
    alone = ki.attention(q[:, 512:1024], k[:, 512:1024], v[:, 512:1024])
    torch.testing.assert_close(out[:, 512:1024], alone)


LOCAL = ki.MaskContract(window=(63, 0))


def chosen(length, mask, function=ki.attention, **extra):
    q = torch.empty(1, length, 2, 16)
    return ki.explain(function, q, q, q, mask, **extra).would_run


@pytest.mark.native
def test_auto_takes_native_kernels_but_for_short_rows():
    assert {chosen(n, mask) for n in (128, 1024, 20_000) for mask in (LOCAL, ki.MaskContract())} == {"native"}
    assert chosen(1024, ki.MaskContract(), ki.attention_with_lse, softcap=5.0) == "native"
    assert chosen(64, LOCAL) == chosen(64, ki.MaskContract()) == "sdpa"
    assert chosen(64, ki.MaskContract(), ki.attention_with_lse) == "reference"


def test_auto_skips_where_it_pays_and_calls_torch_where_it_does_not(monkeypatch):
    monkeypatch.setattr(native, "has_libraries", lambda: False)
    assert chosen(1024, LOCAL) == "cpu"
    assert chosen(20_000, LOCAL) == "cpu"
    assert chosen(128, LOCAL) == "sdpa"
    assert chosen(1024, ki.MaskContract()) == "sdpa"
    assert chosen(1024, ki.MaskContract(), softcap=5.0) == "cpu"
    assert chosen(1024, ki.MaskContract(), ki.attention_with_lse) == "cpu"


@pytest.mark.native
def test_few_queries_are_left_to_kernels_without_tiles():
    q, k = torch.empty(1, 63, 2, 16), torch.empty(1, 4096, 2, 16)
    explained = ki.explain("attention", q, k, k)
    assert (explained.would_run, explained.verdicts["native"]) == (
        "cpu",
        "too few scores for tiles of 64 queries to pay",
    )
    assert ki.explain("attention", q[:, :1], k, k).would_run == "sdpa"


def test_the_order_of_the_backends():
    order = ["fa4", "triton", "gluon", "flex", "varlen", "native", "cpu", "sdpa", "reference"]
    assert [b.name for b in BACKENDS] == order


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why a machine without CUDA cannot")
def test_what_needs_cuda_says_so():
    q = torch.zeros(1, 4, 2, 16)
    for backend, reason in (("fa4", "needs CUDA tensors"), ("flex", "needs a CUDA device"), ("varlen", "needs CUDA")):
        with pytest.raises(ki.Ineligible, match=reason):
            ki.attention(q, q, q, backend=backend)
    with pytest.raises(ki.Ineligible, match="log-sum-exp has no gradient"):
        ki.attention_with_lse(q, q, q, backend="varlen")


def test_packed_lengths_refuse_what_they_cannot_say():
    def packing_rule(q, k, mask):
        return gpu_rules._packing_rule(contract.AttentionCall(q, k, k, mask, None, 0.0, None, False))

    q, k = torch.zeros(1, 4, 2, 16), torch.zeros(1, 9, 2, 16)
    assert packing_rule(q, k, ki.MaskContract()) is None
    assert "last query" in packing_rule(q, k, ki.MaskContract(q_offset=0))
    documents = ki.MaskContract(doc_ids=torch.zeros(1, 9, dtype=torch.int64))
    assert "T = S" in packing_rule(q, k, documents)
    assert packing_rule(k, k, documents) is None
    assert packing_rule(q[:, :0], k, ki.MaskContract()) == "needs at least one query and one key"


def test_the_lengths_that_packing_takes_are_those_of_the_contract():
    """The same packing that varlen and fa4 use, around the reference: padding is left out and comes back as 0."""
    from kernel_index.kernels.attention.dense_attention.packing import packed as pack
    from kernel_index.kernels.attention.dense_attention.packing import unpacked

    mask = ki.MaskContract(window=(3, 0), doc_ids=packed(13))
    x = qkv(Maker(torch.float64), 2, 13, 13, 2, 2, 8)
    lengths = mask.varlen()
    parts = [pack(t, lengths) for t in x.values()]
    ends = lengths.cu_seqlens_q.tolist()
    outs = []
    for a, b in itertools.pairwise(ends):
        piece = [p[None, a:b] for p in parts]
        outs.append(ki.attention(*piece, ki.MaskContract(window=(3, 0)), backend="reference")[0])
    actual = unpacked(torch.cat(outs), lengths, 2, 13)
    torch.testing.assert_close(actual, ki.attention(**x, mask=mask, backend="reference"))


@pytest.mark.parametrize("backend", ["triton", "native", "cpu"])
def test_a_second_derivative_is_refused(backend):
    x = {n: t.requires_grad_() for n, t in qkv(Maker(torch.float32), 1, 4, 4, 2, 2, 8).items()}
    out = ki.attention(**x, backend=backend)
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        torch.autograd.grad(out.sum(), list(x.values()), create_graph=True)


def test_triton_refuses_float64_and_wide_heads():
    q = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    with pytest.raises(ki.Ineligible, match="float32, bfloat16 or float16"):
        ki.attention(q, q, q, backend="triton")
    q = torch.zeros(1, 2, 1, 264)
    with pytest.raises(ki.Ineligible, match="at most 256"):
        ki.attention(q, q, q, backend="triton")
