"""How flash-attn-4 is told a mask: lists of tiles with a predicate, and packed lengths as they were given."""

import sys
import types
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.core.target import Target, has_package
from kernel_index.core.testing import Maker
from kernel_index.kernels.attention.dense_attention import fa4, gpu_rules
from kernel_index.kernels.attention.dense_attention.cases import qkv
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall
from kernel_index.kernels.attention.dense_attention.tile_mask import tile_mask
from tests.kernels.attention.on_a_gpu import MASKS, compare_on_a_gpu, leaves_of, sink_of
from tests.masks.contracts import calls
from tests.masks.test_prefix_trees import tree_calls

MANY = settings(max_examples=120, deadline=None, derandomize=True)
FEW = settings(MANY, max_examples=50)
TILE = (4, 3)


@st.composite
def any_calls(draw):
    """Also with prefixes, where the queries begin in each row, lengths, and trees."""
    kind = draw(st.sampled_from(["plain", "plain", "prefix", "rows", "lengths", "tree"]))
    if kind == "tree":
        return draw(tree_calls())
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    if kind == "prefix":
        return ki.MaskContract(prefix=draw(st.integers(0, 9))), rows, tokens, tokens
    if kind == "rows":
        offsets = torch.tensor(draw(st.lists(st.integers(-2, 6), min_size=rows, max_size=rows)))
        return ki.MaskContract(q_offset=offsets), rows, tokens, draw(st.integers(1, 14))
    if kind == "lengths":
        return ki.MaskContract.from_cu_seqlens(draw(lengths(tokens))), 1, tokens, tokens
    return draw(calls())


@st.composite
def lengths(draw, tokens: int) -> torch.Tensor:
    """Cumulative ones, which may end before the last token."""
    cuts = draw(st.lists(st.integers(0, tokens), min_size=0, max_size=4))
    return torch.tensor([0, *sorted(cuts)], dtype=torch.int32)


def allowed_of(lists, of_pair, shape, tile):
    """Bool [B, T, S] as the package reads it: full tiles whole, partial ones by the predicate."""
    batch, queries, keys = shape
    allowed = torch.zeros(batch, -(-queries // tile[0]) * tile[0], -(-keys // tile[1]) * tile[1], dtype=torch.bool)
    partial, partial_indices, full, full_indices = (x.expand(batch, *x.shape[1:])[:, 0] for x in lists)
    for b in range(batch):
        for row in range(partial.shape[1]):
            for count, indices, whole in ((partial, partial_indices, False), (full, full_indices, True)):
                for column in indices[b, row, : count[b, row]].tolist():
                    area = slice(row * tile[0], (row + 1) * tile[0]), slice(column * tile[1], (column + 1) * tile[1])
                    assert not allowed[b][area].any(), "each tile once"
                    allowed[b][area] = True if whole else of_pair(b)[area]
    return allowed[:, :queries, :keys]


def predicate_of(name, bounds):
    """The predicates of ``fa4_predicates`` for whole rows; they read what they may read, to the ends of tiles."""

    def of_row(b):
        start, end = bounds[0][b][:, None], bounds[1][b][:, None]
        t, s = torch.arange(start.shape[0])[:, None], torch.arange(1000)
        if name == "causal":
            return (s >= start) & (s <= t)
        if name == "interval":
            return (s >= start) & (s < end)
        return ((s >= start) & (s < end))[:, : bounds[2].shape[1]] & (t < bounds[2][b])

    return of_row


def test_lists_of_tiles_are_the_contract():
    seen = set()

    @MANY
    @given(any_calls())
    def check(call):
        mask, rows, queries, keys = call
        sizes = mask.sizes(rows, queries, keys, torch.device("cpu"))
        if not queries or not keys:
            return
        tiles = tile_mask(mask, sizes, TILE)
        seen.add(tiles.predicate)
        of_pair = predicate_of(tiles.predicate, tiles.bounds)
        want = mask.dense(rows, queries, keys)[:, 0]
        assert torch.equal(allowed_of(tiles.by_query, of_pair, (rows, queries, keys), TILE), want)
        by_key = allowed_of(tiles.by_key, lambda b: of_pair(b).T, (rows, keys, queries), TILE[::-1])
        assert torch.equal(by_key.transpose(1, 2), want)
        assert tile_mask(mask, sizes, TILE).by_key[0] is tiles.by_key[0], "kept"

    check()
    assert seen == {"causal", "interval", "path"}


def attend(q, k, v, allowed, scale, softcap, sink):
    """As the package does it: a query without keys has the log-sum-exp of its sink."""
    groups = q.shape[2] // k.shape[2]
    z = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(groups, 2)) * scale
    z = softcap * (z / softcap).tanh() if softcap else z
    last = z.new_full((z.shape[1],), -torch.inf) if sink is None else sink.to(z.dtype)
    z = z.masked_fill(~allowed[:, None], -torch.inf)
    z = torch.cat([z, last[:, None, None].expand(*z.shape[:3], 1)], -1)
    none = z.isneginf().all(-1, keepdim=True)
    p = z.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)[..., :-1]
    lse = z.masked_fill(none, 0.0).logsumexp(-1).masked_fill(none[..., 0], -torch.inf)
    return torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(groups, 2)).contiguous(), lse


class Sparse(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def flash_attn_func(
    q, k, v, *, softmax_scale, softcap, learnable_sink, return_lse, mask_mod=None, aux_tensors=(),
    block_sparse_tensors=None, block_sparse_tensors_bwd=None, **band,
):  # fmt: skip
    shape = q.shape[0], q.shape[1], k.shape[1]
    if mask_mod is None:
        allowed = ki.MaskContract(causal=band["causal"], window=band["window_size"]).dense(*shape)[:, 0]
        return attend(q, k, v, allowed, softmax_scale, softcap, learnable_sink)
    *lists, tile = block_sparse_tensors
    assert (return_lse, tile, block_sparse_tensors_bwd.block_size) == (True, TILE, TILE)
    assert all(x.dtype == torch.int32 for x in (*lists, *aux_tensors))
    allowed = allowed_of(lists, predicate_of(mask_mod, aux_tensors), shape, tile)
    return attend(q, k, v, allowed, softmax_scale, softcap, learnable_sink)


def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **how):
    assert cu_seqlens_q is cu_seqlens_k
    assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k <= q.shape[0]
    scale, softcap, sink = how["softmax_scale"], how["softcap"], how["learnable_sink"]
    at = torch.arange(q.shape[0])
    document = torch.bucketize(at, cu_seqlens_q.to(torch.int64), right=True)
    allowed = (document[:, None] == document) & (at <= at[:, None] if how["causal"] else True)
    left = how["window_size"][0]
    allowed = allowed if left is None else allowed & (at >= at[:, None] - left)
    out, lse = attend(q[None], k[None], v[None], allowed[None], scale, softcap, sink)
    return out[0], lse[0]


@pytest.fixture
def package(monkeypatch):
    cute, sparsity = types.ModuleType("flash_attn.cute"), types.ModuleType("flash_attn.cute.block_sparsity")
    cute.flash_attn_func, cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    sparsity.BlockSparseTensorsTorch = Sparse
    predicates = types.ModuleType("fa4_predicates")
    for name in ("causal", "interval", "path"):
        setattr(predicates, name, name)
    folder = gpu_rules.__name__.rsplit(".", 1)[0]
    for name, module in (
        ("flash_attn", types.ModuleType("flash_attn")),
        ("flash_attn.cute", cute),
        ("flash_attn.cute.block_sparsity", sparsity),
        (f"{folder}.fa4_predicates", predicates),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules[folder], "fa4_predicates", predicates, raising=False)
    monkeypatch.setattr(fa4, "fa4_tile", lambda width: TILE)


def compare(monkeypatch, form, mask, inputs, sink=None):
    monkeypatch.setattr(fa4, "fa4_form", lambda call: form)
    leaves = [x.requires_grad_() for x in (*inputs.values(), *([] if sink is None else [sink]))]
    out, lse = fa4.attention_fa4(AttentionCall(*leaves[:3], mask, None, 2.0, sink, True))
    expected = ki.attention_with_lse(*leaves[:3], mask, softcap=2.0, sink=sink, backend="reference")
    assert out.is_contiguous()
    assert lse.is_contiguous()
    up, up_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isneginf(), 0.0)
    results = []
    for o, sums in ((out, lse), expected):
        loss = (o * up).sum() + (sums.masked_fill(sums.isneginf(), 0.0) * up_lse).sum()
        results.append([o, sums, *torch.autograd.grad(loss, leaves)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9, check_dtype=False)


def test_lists_are_what_the_contract_says(package, monkeypatch):
    @FEW
    @given(any_calls(), st.booleans())
    def check(call, with_sink):
        mask, rows, queries, keys = call
        if queries and keys:
            m = Maker(torch.float64, seed=queries)
            compare(
                monkeypatch, "lists", mask, qkv(m, rows, queries, keys, 4, 2, 4), m.normal(4) if with_sink else None
            )

    check()


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(
    ("form", "mask", "keys", "empty"),
    [
        ("lists", ki.MaskContract(doc_ids=torch.tensor([[0, 0, -1, 1, 1, 1]])), 6, 2),
        ("lists", ki.MaskContract(subtree_end=torch.tensor([[2, 2, 2, 6, 6, 6]])), 6, 2),
        ("lists", ki.MaskContract(prefix=2, cu_seqlens=(torch.tensor([0, 3, 5]), None)), 6, 5),
        ("lists", ki.MaskContract(window=(1, 0), q_offset=0), 4, 5),
        ("band", ki.MaskContract(), 4, 1),
    ],
)
def test_a_query_without_keys_spoils_nothing(package, form, mask, keys, empty, with_sink):
    """Without ``guarded_on_device``, which takes NaN out of queries on a CPU alone."""
    m = Maker(torch.float64)
    inputs, sink = qkv(m, 1, 6, keys, 4, 2, 4), m.normal(4) if with_sink else None
    inputs["q"][:, empty] = float("nan")
    leaves = [x.requires_grad_() for x in inputs.values()]
    options = {"softmax_scale": 0.5, "softcap": 0.0, "learnable_sink": sink, "return_lse": True}
    out, lse = fa4._WAYS[form](AttentionCall(*leaves, mask, None, 0.0, sink, True), options)
    assert (out[:, empty] == 0).all()
    assert lse[:, :, empty].isneginf().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel of ours is interpreted on a CPU")


@needs_interpreter
def test_given_lengths_are_not_read(package, monkeypatch):
    monkeypatch.setattr(ki.MaskContract, "varlen", None)

    @FEW
    @given(st.integers(1, 14).flatmap(lambda n: st.tuples(st.just(n), lengths(n))), st.sampled_from([None, 2]))
    def check(drawn, left):
        tokens, given_lengths = drawn
        mask = ki.MaskContract.from_cu_seqlens(given_lengths, window=(left, None))
        compare(monkeypatch, "lengths", mask, qkv(Maker(torch.float64, seed=tokens), 1, tokens, tokens, 4, 2, 4))

    check()


@needs_interpreter
def test_what_comes_after_the_last_document_spoils_nothing(package, monkeypatch):
    monkeypatch.setattr(fa4, "fa4_form", lambda call: "lengths")
    mask = ki.MaskContract.from_cu_seqlens(torch.tensor([0, 2, 4]))
    inputs = qkv(Maker(torch.float64), 1, 7, 7, 4, 2, 4)
    for x in inputs.values():
        x[:, 4:] = float("nan")
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = fa4.attention_fa4(AttentionCall(*leaves, mask, None, 0.0, None, True))
    assert (out[:, 4:] == 0).all()
    assert lse[..., 4:].isneginf().all()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()
        assert (gradient[:, 4:] == 0).all()


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, -1, 2], [4, 4, 4, 4, 5, 5, 5]])


def test_known_lengths_are_handed_over(package, monkeypatch):
    """From a contract on the host, whose lengths are read there."""
    compare(monkeypatch, "packed", ki.MaskContract(doc_ids=DOCUMENTS), qkv(Maker(torch.float64), 2, 7, 7, 4, 2, 4))


IDS = torch.zeros(1, 64, dtype=torch.int64)
LENGTHS = torch.tensor([0, 20, 64])


@pytest.mark.parametrize(
    ("mask", "rows", "expected"),
    [
        (ki.MaskContract(), 2, "band"),
        (ki.MaskContract(window=(5, 0)), 2, "band"),
        (ki.MaskContract(q_offset=3), 1, "lists"),
        (ki.MaskContract(doc_ids=IDS), 1, "lists"),
        (ki.MaskContract(prefix=8), 2, "lists"),
        (ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[9])), 1, "lists"),
        (ki.MaskContract(subtree_end=torch.full((64,), 64)), 1, "lists"),
        (ki.MaskContract.from_cu_seqlens(LENGTHS), 1, "lengths"),
        (ki.MaskContract.from_cu_seqlens(LENGTHS, LENGTHS), 1, "lists"),
    ],
)
def test_which_form(monkeypatch, mask, rows, expected):
    q = torch.empty(rows, 64, 2, 64, dtype=torch.bfloat16)
    call = AttentionCall(q, q, q, mask, None, 0.0, None, False)
    monkeypatch.setattr(gpu_rules, "fa4_package_why_not", lambda: None)
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    assert gpu_rules.fa4_form(call) == expected
    with_sink = call._replace(sink=torch.zeros(2, requires_grad=True))
    assert gpu_rules.fa4_form(with_sink) == {"lengths": "lists"}.get(expected, expected)
    assert gpu_rules.fa4_why_not(with_sink) is None
    if mask.doc_ids is not None:
        assert gpu_rules.measured_kind(call) == ("infer", "documents")
    assert gpu_rules.fa4_details(call) == (("mask_lowering", expected),)
    assert gpu_rules.fa4_why_not(call) is None
    assert gpu_rules.fa4_not_worth(call) != gpu_rules.WAITS
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 100))
    elsewhere = {"lists": "packed"}.get(expected, expected)
    assert gpu_rules.fa4_form(call) == elsewhere
    reason = gpu_rules.fa4_why_not(call)
    assert reason == (mask.row_varlen_why_not(call.sizes) if elsewhere == "packed" else None)
    assert (gpu_rules.fa4_not_worth(call) == gpu_rules.WAITS) == (elsewhere == "packed")


def test_documents_whose_lengths_are_known_are_packed(monkeypatch):
    q = torch.empty(1, 64, 2, 64, dtype=torch.bfloat16, device="meta")
    mask = ki.MaskContract(doc_ids=IDS).to("meta")
    call = AttentionCall(q, q, q, mask, None, 0.0, None, False)
    monkeypatch.setattr(gpu_rules, "fa4_package_why_not", lambda: None)
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    assert gpu_rules.fa4_form(call) == "packed"
    assert gpu_rules.fa4_why_not(call) is None
    assert gpu_rules.fa4_not_worth(call) != gpu_rules.WAITS
    assert gpu_rules.measured_kind(call) == ("infer", "lengths")


@pytest.mark.parametrize(("width", "grad"), [(32, True), (80, False)])
def test_heads_of_which_no_lists_were_compared_are_packed(monkeypatch, width, grad):
    monkeypatch.setattr(gpu_rules, "fa4_package_why_not", lambda: None)
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    q = torch.empty(1, 64, 2, width, dtype=torch.bfloat16, requires_grad=grad)
    call = AttentionCall(q, q, q, ki.MaskContract(doc_ids=IDS), None, 0.0, None, False)
    assert (gpu_rules.fa4_form(call), gpu_rules.fa4_why_not(call)) == ("packed", None)
    assert gpu_rules.fa4_not_worth(call) == gpu_rules.WAITS


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_that_must_repeat_are_not_taken_by_lists(monkeypatch, deterministic, grad):
    monkeypatch.setattr(gpu_rules, "fa4_package_why_not", lambda: None)
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    q = torch.empty(1, 64, 2, 64, dtype=torch.bfloat16, requires_grad=grad)
    listed = AttentionCall(q, q, q, ki.MaskContract(prefix=8), None, 0.0, None, False)
    assert gpu_rules.fa4_why_not(listed) == (gpu_rules.ANY_ORDER if grad else None)
    assert gpu_rules.fa4_why_not(listed._replace(mask=ki.MaskContract())) is None


def test_lists_end_where_they_would_be_large(monkeypatch):
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    monkeypatch.setattr(gpu_rules, "LARGEST_LISTS", 15)
    q = torch.empty(1, 64, 2, 64)
    assert gpu_rules.fa4_form(AttentionCall(q, q, q, ki.MaskContract(prefix=8), None, 0.0, None, False)) == "packed"


on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_package("flash_attn"), reason="needs a CUDA device and flash-attn-4"
)


@on_a_gpu
@pytest.mark.parametrize("width", gpu_rules.LIST_WIDTHS)
@pytest.mark.parametrize(("softcap", "with_sink"), [(0.0, False), (20.0, False), (0.0, True)])
@pytest.mark.parametrize("name", MASKS)
def test_lists_on_a_gpu(name, softcap, with_sink, width):
    """Output, log-sum-exp and all gradients by lists of tiles against the reference in float32."""
    if with_sink and width not in gpu_rules.BAND_SINK_WIDTHS:
        pytest.skip("gradients of sinks are not taken at this head size")
    sink = sink_of(8) if with_sink else None
    compare_on_a_gpu(MASKS[name]().to("cuda"), leaves_of(2, 700, 2, width), softcap=softcap, sink=sink, form="lists")


@on_a_gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("left", [None, 90])
@pytest.mark.parametrize("ends", [[700], [300, 300, 431, 700], [1, 128, 500]], ids=str)
def test_given_lengths_on_a_gpu(ends, left, width):
    cumulative = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
    mask = ki.MaskContract.from_cu_seqlens(cumulative, window=(left, None))
    compare_on_a_gpu(mask, leaves_of(1, 700, 2, width), form="lengths")
