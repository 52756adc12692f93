"""The indexer in C++: picks and scores of the plain form, whatever the contract, and where it does not run."""

import random
from typing import Any

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.routing.lightning_indexer import native as module


def drawn(seed, whole=True):
    """Few or many queries, any mask; whole numbers, so that scores are exact and mostly tied."""
    chance, g = random.Random(seed), torch.Generator().manual_seed(seed)
    keys, heads, width = chance.choice([1, 40, 127, 700]), chance.choice([1, 3]), chance.choice([1, 5, 16, 20])
    queries = chance.choice([1, 16, 17, 70, keys])

    def draw(*shape):
        x = torch.randn(*shape, generator=g)
        return (1.3 * x).round() if whole else x

    documents = torch.randint(0, 5, (2, 6), generator=g).repeat_interleave(-(-keys // 6), 1)[:, :keys] - 1
    causal = chance.random() < 0.8
    mask: dict[str, Any] = {
        "causal": causal,
        "q_offset": chance.choice([None, 0, -3, keys - 1]),
        "doc_ids": chance.choice([None, documents]),
    }
    if causal:
        mask["window"] = chance.choice([None, (0, 0), (5, 0), (keys // 2, 0)])
    if chance.random() < 0.3:
        mask["validity"] = ki.attention_validity(valid_token_counts=[keys // 2, 0])
    tensors = draw(2, queries, heads, width), draw(2, keys, width), draw(2, queries, heads)
    return tensors, {"topk": chance.choice([1, 4, 30, 200]), "mask": ki.MaskContract(**mask)}


def both(tensors, call):
    """The selection by C++ and by PyTorch."""
    return tuple(ki.lightning_indexer(*tensors, **call, backend=name) for name in ("auto", "chunked"))


@pytest.mark.native
@pytest.mark.parametrize("special", [None, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("seed", range(40))
def test_picks_are_those_of_the_plain_form(seed, special, ran):
    (q, k, w), call = drawn(seed)
    if special is not None:
        k[:, ::5, 0] = special
        k[1, ::7, -1] = -special
    actual, expected = both((q, k, w), call)
    assert len(ran) == 1
    assert torch.equal(actual.indices, expected.indices)
    assert torch.equal(actual.valid, expected.valid)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.native
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_agree_within_rounding(queries, dtype, ran):
    g = torch.Generator().manual_seed(0)
    q, k, w = (torch.randn(2, *n, generator=g).to(dtype) for n in ((queries, 3, 24), (900, 24), (queries, 3)))
    actual, expected = both((q, k, w), {"topk": 20})
    assert len(ran) == 1
    torch.testing.assert_close(actual.scores, expected.scores)
    assert (actual.indices == expected.indices).float().mean() > 0.995


def test_the_winners_of_a_tie_are_the_first_whatever_comes_later():
    """Rising scores let the kept ones be cut again and again; zeros of either sign are one tie."""
    q, w = torch.ones(1, 20, 1, 1), torch.ones(1, 20, 1)
    rising = torch.arange(900.0).floor_divide(3).view(1, 900, 1)
    for queries in (1, 20):
        picked = ki.lightning_indexer(q[:, :queries], rising, w[:, :queries], topk=4)
        assert picked.indices[0, -1].tolist() == [897, 898, 899, 894]
        zeros = torch.full((1, 900, 1), 1e-30)
        zeros[:, 7:] *= -1
        picked = ki.lightning_indexer(q[:, :queries], zeros, -1e-30 * w[:, :queries], topk=9)
        assert picked.indices[0, -1].tolist() == list(range(9))


@pytest.mark.parametrize("queries", [1, 300])
def test_the_same_bits_for_any_number_of_threads(queries, monkeypatch):
    monkeypatch.setattr(module, "ONE_THREAD", 0)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, *n, generator=g) for n in ((queries, 3, 24), (3000, 24), (queries, 3))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ki.lightning_indexer(*tensors, topk=20))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.indices, found[0].indices)
        assert torch.equal(other.scores, found[0].scores)


@pytest.mark.native
def test_where_it_does_not_run(monkeypatch, ran):
    (q, k, w), call = drawn(3)
    expected = ki.lightning_indexer(q, k, w, **call).indices
    assert len(ran) == 1
    for dtype in (torch.float64, torch.float16):
        assert torch.equal(ki.lightning_indexer(*(x.to(dtype) for x in (q, k, w)), **call).indices, expected)
    ki.lightning_indexer(q[:, :0], k, w[:, :0], **call)
    monkeypatch.setattr(native, "has_libraries", lambda: False)
    assert torch.equal(ki.lightning_indexer(q, k, w, **call).indices, expected)
    assert len(ran) == 1


@pytest.mark.native
def test_a_compiled_caller_gets_it(ran):
    (q, k, w), call = drawn(3)
    expected = ki.lightning_indexer(q, k, w, **call).indices
    compiled = torch.compile(lambda *x: ki.lightning_indexer(*x, **call).indices, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, w), expected)
    assert len(ran) == 2


@pytest.mark.native
def test_the_receipt_says_what_chose(ran, monkeypatch):
    q, k, w = torch.randn(1, 3, 2, 8), torch.randn(1, 40, 8), torch.randn(1, 3, 2)
    with ki.receipts() as log:
        ki.lightning_indexer(q, k, w, topk=4)
        monkeypatch.setattr(native, "has_libraries", lambda: False)
        ki.lightning_indexer(q, k, w, topk=4)
    assert [r.details["choice"] for r in log] == ["native", "torch"]
    assert len(ran) == 1
