"""The two-step selection in C++: the picks of the plain formula, whatever the contract, and where it does not run."""

import random
from typing import Any

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native

SIZE = 2


def drawn(seed, queries=None, blocks=None, whole=True, dtype=torch.float32):
    """The arguments of one call: few or many queries, any mask, scores that are whole numbers and mostly tied."""
    chance, g = random.Random(seed), torch.Generator().manual_seed(seed)
    groups, heads, width, batch = chance.choice([1, 2]), chance.choice([1, 2]), chance.choice([3, 16, 20]), 2
    blocks = blocks or chance.choice([5, 13, 70, 150, 400])
    keys = blocks * SIZE - chance.randrange(SIZE)
    queries = queries or chance.choice([1, 3, 16, 17, 70, keys])

    def draw(*shape):
        x = torch.randn(*shape, generator=g)
        return (1.5 * x).round() if whole else x

    q, block_keys = draw(batch, queries, groups * heads, width).to(dtype), draw(batch, blocks, groups, width)
    documents = torch.randint(0, 5, (batch, 6), generator=g).repeat_interleave(-(-keys // 6), 1)[:, :keys] - 1
    mask: dict[str, Any] = {
        "q_offset": chance.choice([None, 0, -3, keys - 1]),
        "window": chance.choice([None, (0, 0), (2 * SIZE, 0), (keys // 2, 0)]),
        "doc_ids": chance.choice([None, documents]),
    }
    if chance.random() < 0.3:
        mask["validity"] = ki.attention_validity(valid_token_counts=[keys // 2, 0])
    forced = tuple(name for name in ("current", "sink", "local") if chance.random() < 0.6)
    call: dict[str, Any] = {
        "coarse_ratio": chance.choice([1, 2, 3, 8]),
        "coarse_topc": chance.choice([1, 2, 15, 40]),
        "final_topk": chance.choice([max(1, len(forced)), 4, 30]),
        "forced": forced,
        "block_size": SIZE,
        "kv_len": keys,
        "mask": ki.MaskContract(**mask),
    }
    return q, block_keys, call


def both(q, block_keys, call):
    """The selection by C++ and by PyTorch."""
    return tuple(ki.hierarchical_block_select(q, block_keys, **call, backend=name) for name in ("auto", "chunked"))


@pytest.mark.native
@pytest.mark.parametrize("special", [None, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("seed", range(60))
def test_picks_are_those_of_the_plain_formula(seed, special, ran):
    q, block_keys, call = drawn(seed)
    if special is not None:
        block_keys[:, ::5, :, 0] = special
        block_keys[1, ::7, :, 1] = -special
        q[:, ::3] = -q[:, ::3].abs()
    actual, expected = both(q, block_keys, call)
    assert len(ran) == 1
    assert torch.equal(actual.indices, expected.indices)
    assert torch.equal(actual.valid, expected.valid)
    assert actual.plan == expected.plan


@pytest.mark.native
@pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize(("ratio", "topc"), [(8, 40), (1, 150), (700, 2)])
def test_many_candidates_are_cut_to_the_best(ratio, topc, queries, special, ran):
    """Of some hundred candidates those that only equal the least one kept lose, those that are not numbers do not."""
    q, block_keys, _ = drawn(0, queries, 700)
    q[..., 1:], q[..., 0] = q[..., 1:].clamp(0, 1), 1
    block_keys[:, 650:, :, 0] += 3
    block_keys[:, 300::40, :, 0] = special
    call = {"coarse_ratio": ratio, "coarse_topc": topc, "block_size": SIZE, "kv_len": 1400}
    for topk in (3, 20):
        actual, expected = both(q, block_keys, call | {"final_topk": topk})
        assert torch.equal(actual.indices, expected.indices)
    assert len(ran) == 2


@pytest.mark.native
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picks_agree_but_for_what_rounding_ties(queries, dtype, ran):
    q, block_keys, _ = drawn(0, queries, 150, whole=False, dtype=dtype)
    call = {"coarse_ratio": 4, "coarse_topc": 5, "final_topk": 6, "block_size": SIZE, "kv_len": 300, "recall": True}
    actual, expected = both(q, block_keys, call)
    assert len(ran) == 2  # once more for the recall
    agree = (actual.indices == expected.indices).all(-1).float().mean()
    assert agree > 0.995
    assert actual.plan.recall == pytest.approx(expected.plan.recall, abs=1e-3)


def test_zeros_of_either_sign_are_tied():
    """Products that vanish leave −0 for negative ones."""
    q, block_keys = torch.full((1, 20, 1, 1), -1e-30), torch.full((1, 10, 1, 1), 1e-30)
    block_keys[:, 3:6] = -1e-30
    picked = ki.hierarchical_block_select(q, block_keys, final_topk=4, block_size=2)
    assert picked.indices[0, -1, 0].tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("queries", [1, 300])
def test_the_same_bits_for_any_number_of_threads(queries, monkeypatch):
    from kernel_index.routing.hierarchical_block_expansion import native as module

    monkeypatch.setattr(module, "ONE_THREAD", 0)
    q, block_keys, _ = drawn(0, queries, 150, whole=False)
    call = {"coarse_ratio": 4, "coarse_topc": 5, "final_topk": 6, "block_size": SIZE, "kv_len": 300}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ki.hierarchical_block_select(q, block_keys, **call).indices)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.native
def test_where_it_does_not_run(monkeypatch, ran):
    q, block_keys, call = drawn(1)
    expected = ki.hierarchical_block_select(q, block_keys, **call).indices
    assert len(ran) == 1
    for dtype in (torch.float64, torch.float16):
        assert torch.equal(ki.hierarchical_block_select(q.to(dtype), block_keys, **call).indices, expected)
    ki.hierarchical_block_select(q[:, :0], block_keys, **call)
    compiled = torch.compile(lambda q: ki.hierarchical_block_select(q, block_keys, **call).indices, backend="eager")
    assert torch.equal(compiled(q), expected)
    monkeypatch.setattr(native, "has_libraries", lambda: False)
    assert torch.equal(ki.hierarchical_block_select(q, block_keys, **call).indices, expected)
    assert len(ran) == 1


@pytest.mark.native
def test_a_receipt_says_what_scored(monkeypatch):
    q, k = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 1, 8)
    config = ki.ClusteredSparseConfig(block_size=4, topk=3, hierarchy=(2, 2))

    def named():
        with ki.receipts() as log:
            ki.clustered_sparse_attention(q, k, k, config=config)
        return log[0].details["scoring_backend"]

    assert named() == "hierarchical, by native"
    monkeypatch.setattr(native, "has_libraries", lambda: False)
    assert named() == "hierarchical"
