"""What the conformance test cannot know about exact-token attention: laws, telemetry, staging, refusals."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.exact_token_sparse import cpu, torch_op
from kernel_index.routing import token_unions, triton_union_sums

SCHEMA = {
    *("path", "reason", "indexer", "seq_len", "requested_backend", "actual_backend", "runtime_mode"),
    *("fallback_reason", "staging"),
}
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])


def qkv(queries=70, keys=70, heads=4, groups=2, width=16, seed=0, **made):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, heads), (keys, groups), (keys, groups))
    return tuple(torch.randn(1, n, h, width, generator=generator, **made) for n, h in sizes)


def length_for(backend: str) -> int:
    """More than a chunk of queries; fewer in the interpreter, which knows no chunks and takes its time."""
    return 18 if backend == "triton" else 70


MASKS = {
    "documents": lambda n: ki.MaskContract(window=(n // 4, 0), doc_ids=torch.arange(n) // (n // 3)),
    "prefix": lambda n: ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[n // 2])),
    "both sides": lambda n: ki.MaskContract(causal=False, window=(n // 7, n // 3)),
}


@BACKENDS
@pytest.mark.parametrize("name", MASKS)
def test_picking_everything_is_dense_attention(name, backend):
    n = length_for(backend)
    mask = MASKS[name](n)
    q, k, v = (x.requires_grad_() for x in qkv(n, n))
    every = torch.randperm(n).expand(1, n, n)
    out = ki.exact_token_attention(q, k, v, every, mask=mask, backend=backend)
    dense = ki.attention(q, k, v, mask, backend="reference")
    upstream = torch.randn_like(out)
    grads = [torch.autograd.grad(x, (q, k, v), upstream) for x in (out, dense)]
    for actual, expected in zip((out, *grads[0]), (dense, *grads[1]), strict=True):
        torch.testing.assert_close(actual, expected)


@BACKENDS
def test_a_pick_counts_once_and_in_any_order(backend):
    n = length_for(backend)
    q, k, v = qkv(n, n)
    picks = torch.randint(0, n, (1, n, 2, 12))
    doubled = torch.cat([picks.flip(-1), torch.full_like(picks[..., :3], -1), picks[..., :5]], -1)
    once, twice = (ki.exact_token_attention(q, k, v, p, backend=backend) for p in (picks, doubled))
    torch.testing.assert_close(once, twice)


@BACKENDS
def test_picks_of_any_layout(backend):
    """Picks that lie in memory by key head, and a selection that is one row shown for every query."""
    q, k, v = qkv(6, 6)
    by_head = torch.randint(0, 6, (1, 2, 6, 3)).transpose(1, 2)
    shown = torch.tensor([0, 2, 5]).expand(1, 6, 3)
    for picks in (by_head, shown):
        expected = ki.exact_token_attention(q, k, v, picks.contiguous(), backend=backend)
        assert torch.equal(ki.exact_token_attention(q, k, v, picks, backend=backend), expected)


@BACKENDS
def test_a_query_never_sees_what_only_its_neighbours_picked(backend):
    """Even and odd queries of one chunk pick even and odd keys; what the odd ones see is then replaced."""
    n = length_for(backend)
    q, k, v = qkv(n, n)
    parity = torch.arange(n)[:, None] % 2
    picks = (parity + 2 * torch.arange(n // 2))[None]
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 1::2], changed_v[:, 1::2] = 40.0, -7.0
    before, after = (
        ki.exact_token_attention(q, *kv, picks, backend=backend) for kv in ((k, v), (changed_k, changed_v))
    )
    assert torch.equal(before[:, ::2], after[:, ::2])
    assert not torch.equal(before[:, 3::2], after[:, 3::2])


@BACKENDS
def test_queries_without_a_key_give_zero_and_no_gradient(backend):
    q, k, v = (x.requires_grad_() for x in qkv(5, 5))
    picks = torch.tensor([[-1, -1], [0, 1], [3, 4], [-1, 2], [-1, -1]])[None]  # the third one picks its future
    out = ki.exact_token_attention(q, k, v, picks, backend=backend)
    empty = torch.tensor([0, 2, 4])
    assert not out[:, empty].any()
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not grads[0][:, empty].any()
    assert all(torch.isfinite(g).all() for g in grads)


def test_the_future_changes_no_earlier_pick_output_or_gradient():
    """Indexer and attention together; the cut lies inside a chunk of queries."""
    cut = 40
    q, k, v = qkv()
    generator = torch.Generator().manual_seed(1)
    q_idx, k_idx, w = (torch.randn(1, 70, *n, generator=generator) for n in ((2, 8), (8,), (2,)))
    upstream = torch.randn(q.shape, generator=generator)
    upstream[:, cut:] = 0.0

    def trial(scale):
        later = torch.where(torch.arange(70) < cut, 1.0, scale)
        shaped = later[:, None, None]
        leaves = [(x * shaped).requires_grad_() for x in (q, k, v)]
        picked = ki.lightning_indexer(q_idx * shaped, k_idx * later[:, None], w * later[:, None], topk=6)
        out = ki.exact_token_attention(*leaves, picked, backend="cpu")
        return picked, out, torch.autograd.grad(out, leaves, upstream)

    before, after = trial(1.0), trial(-50.0)
    assert torch.equal(before[0].indices[:, :cut], after[0].indices[:, :cut])
    assert not torch.equal(before[0].indices, after[0].indices)
    torch.testing.assert_close(before[1][:, :cut], after[1][:, :cut])
    for a, b in zip(before[2], after[2], strict=True):
        torch.testing.assert_close(a[:, :cut], b[:, :cut])
        assert not b[:, cut:].any()


def test_documents_packed_and_alone_are_the_same():
    q, k, v = qkv()
    docs = (torch.arange(70) >= 30).long()
    local = torch.randint(-1, 40, (1, 70, 6))
    packed = torch.where((docs[:, None] == 1) & (local >= 0), local + 30, local)
    together = ki.exact_token_attention(q, k, v, packed, mask=ki.MaskContract(doc_ids=docs), backend="cpu")
    for part in (slice(0, 30), slice(30, 70)):
        own = torch.where(local[:, part] < part.stop - part.start, local[:, part], -1)
        alone = ki.exact_token_attention(q[:, part], k[:, part], v[:, part], own, backend="cpu")
        torch.testing.assert_close(together[:, part], alone)


def test_both_branches_have_one_schema_and_say_what_ran():
    q, k, v = qkv()
    picks = torch.randint(0, 70, (1, 70, 4))
    with ki.receipts() as log:
        sparse = ki.exact_token_attention(q, k, v, picks)
        dense = ki.exact_token_attention(q, k, v, None)
        ki.exact_token_attention(q, k, v, None, backend="reference")
    stayed, went, named = (r.details for r in log if r.op == "exact_token_attention")
    assert set(stayed) == set(went) == set(named) == SCHEMA
    assert (stayed["path"], stayed["reason"], stayed["indexer"]) == ("exact_token", "", "given")
    assert (went["path"], went["reason"]) == ("reroute_to_full", "indexer_returned_none")
    assert (went["indexer"], went["seq_len"]) == ("none", 70)
    assert not torch.equal(sparse, dense)
    assert torch.equal(dense, ki.attention(q, k, v))
    for receipt in log:
        if receipt.op == "exact_token_attention":
            assert receipt.details["actual_backend"] == receipt.ran
            assert receipt.details["requested_backend"] == receipt.requested
    assert stayed["staging"] == "row_gather_pair"
    assert went["staging"] == "none"
    assert named["fallback_reason"] == ""
    assert "fa4: needs CUDA tensors" in went["fallback_reason"]
    with pytest.raises(ki.Ineligible, match=r"expected auto or one of: .*cpu"):
        ki.exact_token_attention(q, k, v, picks, backend="dense")


def test_a_selection_is_taken_as_it_is():
    q, k, v = qkv()
    picked = ki.lightning_indexer(q[:, :, :2], k[:, :, 0], torch.rand(1, 70, 2), topk=5)
    with ki.receipts() as log:
        out = ki.exact_token_attention(q, k, v, picked)
    assert log[-1].details["indexer"] == "lightning_indexer"
    again = ki.exact_token_attention(q, k, v, picked.indices, indices_valid=picked.valid)
    assert torch.equal(out, again)
    with pytest.raises(ValueError, match="indices_valid must be None beside a TokenSelection"):
        ki.exact_token_attention(q, k, v, picked, indices_valid=picked.valid)


def test_staging_goes_through_the_pair_gather_in_chunks_of_queries(monkeypatch):
    gathered = []

    def counted(a, b, rows):
        gathered.append((a.shape, rows.shape[0]))
        return original(a, b, rows)

    original = cpu.gather_eager
    monkeypatch.setattr(cpu, "gather_eager", counted)
    q, k, v = qkv(130, 130)
    picks = torch.randint(0, 3, (1, 130, 2, 9))
    ki.exact_token_attention(q, k, v, picks, backend="cpu")
    assert len(gathered) == 3 * 2  # 64, 64 and 2 queries, each key head its own
    assert all(shape == (130, 1, 16) and rows <= 3 for shape, rows in gathered)
    monkeypatch.setattr(cpu, "GIANT", 9 * 13)  # 13 queries of 9 picks at most
    gathered.clear()
    ki.exact_token_attention(q, k, v, picks, backend="cpu")
    assert len(gathered) == 10 * 2


REFUSALS = {
    "indices must be int32 or int64, got torch.float32": {"indices": torch.ones(1, 3, 2)},
    "indices must be int32 or int64, got torch.bool": {"indices": torch.ones(1, 3, 2).bool()},
    "indices must be [B, T, K, topk] or [B, T, topk], got shape (3, 2)": {"indices": torch.ones(3, 2).long()},
    "indices must be [B, T, topk] with q's B and T, (1, 3, 2), got shape (1, 4, 2)": {
        "indices": torch.zeros(1, 4, 2).long()
    },
    "indices must be [B, T, K, topk] with q's B and T and k's K, (1, 3, 2, 5), got shape (1, 3, 4, 5)": {
        "indices": torch.zeros(1, 3, 4, 5).long()
    },
    "indices must be below 3, or -1 for none, got 3": {"indices": torch.full((1, 3, 2), 3)},
    "indices must be below 3, or -1 for none, got -2": {"indices": torch.full((1, 3, 2), -2)},
    "indices_valid must be None where indices are, got Tensor": {"indices": None},
    "indices_valid must be of the shape of indices, (1, 3, 2), got shape (1, 3, 1)": {
        "indices_valid": torch.ones(1, 3, 1).bool()
    },
    "softcap must be at least 0 (0 is off), got -1.0": {"softcap": -1.0},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    q, k, v = qkv(3, 3)
    good = {"indices": torch.zeros(1, 3, 2).long(), "indices_valid": torch.ones(1, 3, 2).bool()}
    with pytest.raises((TypeError, ValueError)) as error:
        ki.exact_token_attention(q, k, v, **(good | REFUSALS[message]))
    assert str(error.value) == message


@pytest.mark.parametrize("together", [0, 8])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("heads", "groups", "lists"), [(6, 2, 2), (2, 1, 1)])
def test_tiles_that_go_together_and_queries_that_go_alone_agree(together, small, heads, groups, lists, monkeypatch):
    """Neighbours that share their tokens, in one round and chunk or in several; the same bits every time."""
    if not launch.interpreting():
        pytest.skip("runs in Triton's interpreter, on a CPU")
    monkeypatch.setattr(torch_op, "TOGETHER", together)
    if lists == 1:  # sorted by PyTorch
        monkeypatch.setattr(torch_op, "MOST_SORTED", 4)
    if small:
        monkeypatch.setattr(triton_union_sums, "ROUND_BYTES", 1)
        monkeypatch.setattr(token_unions, "TABLE_BYTES", 1)
    n = 140  # two tiles of queries and a part of one
    q, k, v = (x.requires_grad_() for x in qkv(n, n, heads, groups, 8))
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(-1, n, (1, 5, lists, 9), generator=generator).repeat_interleave(28, 1)
    picks = picks if lists > 1 else picks[:, :, 0]
    upstream = torch.randn(q.shape, generator=generator)
    found = []
    for backend in ("triton", "triton", "reference"):
        out = ki.exact_token_attention(q, k, v, picks, backend=backend)
        found.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for first, again, expected in zip(*found, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, expected)
