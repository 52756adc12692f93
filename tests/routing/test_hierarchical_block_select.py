"""Two-step selection: against a selection by loops, the law of the exhaustive cut, and what must not leak."""

import pytest
import torch

import kernel_index as ki
from kernel_index.routing.hierarchical_block_expansion import chunked, reference
from kernel_index.routing.legal_blocks import block_means

SIZE = 4


def packed(rows: int, length: int) -> torch.Tensor:
    """Documents that begin inside blocks, one that comes back, padding at the end of the last row."""
    ids = torch.tensor([[7] * 9 + [4] * 6 + [7] * 40, [0] * 22 + [1] * 33])[:rows, :length].clone()
    ids[-1, -3:] = -1
    return ids


MASKS = {
    "causal": lambda: ki.MaskContract(),
    "documents": lambda: ki.MaskContract(doc_ids=packed(2, 45)),
    "window": lambda: ki.MaskContract(window=(13, 0)),
    "prefix": lambda: ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[31, 0])),
    "offset": lambda: ki.MaskContract(window=(26, 0), q_offset=5),
}


FORMS = {  # on a GPU, in C++, all scores by one product, for very many blocks, and plain
    "triton": "triton",
    "native": "native",
    "products": "chunked",
    "fetched": "chunked",
    "reference": "reference",
}


@pytest.fixture(params=FORMS)
def backend(request, monkeypatch):
    if request.param == "fetched":
        monkeypatch.setattr(chunked, "ALL_CHILDREN", 0)
    return FORMS[request.param]


def inputs(queries=45, keys=45, heads=4, groups=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, queries, heads, width, generator=generator)
    k = torch.randn(2, keys, groups, width, generator=generator)
    return q, k


def by_loops(q, keys, mask, kv_len, ratio, topc, topk, forced):
    """The docstring of ``hierarchical_block_select``, one query and head at a time."""
    allowed = mask.dense(q.shape[0], q.shape[1], kv_len)[:, 0]
    offset = kv_len - q.shape[1] if mask.q_offset is None else mask.q_offset
    batch, queries, heads, _ = q.shape
    blocks, groups = keys.shape[1:3]
    out = torch.full((batch, queries, groups, topk), -1, dtype=torch.int32)
    for b in range(batch):
        for t in range(queries):
            here = (t + offset) // SIZE
            seen = allowed[b, t]
            if not seen.any():
                continue
            legal = [j for j in range(min(here, blocks)) if seen[j * SIZE : (j + 1) * SIZE].any()]
            stand = {"current": here if here < blocks else None}
            stand |= {"sink": legal[0] if legal else None, "local": here - 1 if here - 1 in legal else None}
            kept = {stand[name] for name in forced} - {None}
            for g in range(groups):
                mean_q = q[b, t].view(groups, heads // groups, -1)[g].mean(0)
                score = {j: float(mean_q @ keys[b, j, g]) for j in legal}
                members: dict[int, list[int]] = {}
                for j in legal:
                    members.setdefault(j // ratio, []).append(j)
                means = {m: sum(score[j] for j in own) / len(own) for m, own in members.items()}
                best = sorted(members, key=lambda m: (-means[m], m))[:topc]
                candidates = sorted(
                    (j for m in best for j in members[m] if j not in kept), key=lambda j: (-score[j], j)
                )
                picked = sorted([*kept, *candidates[: topk - len(kept)]])
                out[b, t, g, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
    return out


@pytest.mark.parametrize("forced", [("current",), ("sink", "local", "current"), ()], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_against_loops(name, forced, backend):
    q, k = inputs(queries=20 if name == "offset" else 45)
    mask = MASKS[name]()
    keys = block_means(k, SIZE, mask)
    got = ki.hierarchical_block_select(
        q,
        keys,
        coarse_ratio=3,
        coarse_topc=2,
        final_topk=4,
        mask=mask,
        block_size=SIZE,
        forced=forced,
        kv_len=45,
        backend=backend,
    )
    expected = by_loops(q, keys, mask, 45, 3, 2, 4, forced)
    assert torch.equal(got.indices, expected)
    assert torch.equal(got.valid, expected >= 0)
    assert got.plan == (12, 4, 3, 2, 6, 4, got.plan.forced, False, "", None)
    assert set(got.plan.forced) == set(forced)


@pytest.mark.parametrize("name", MASKS)
def test_all_groups_are_the_exhaustive_selection(name, backend):
    q, k = inputs(queries=20 if name == "offset" else 45)
    mask = MASKS[name]()
    call = {"mask": mask, "block_size": SIZE, "kv_len": 45, "final_topk": 4, "recall": True, "backend": backend}
    keys = block_means(k, SIZE, mask)
    exhaustive = ki.hierarchical_block_select(q, keys, coarse_ratio=1, coarse_topc=99, **call)
    all_groups = ki.hierarchical_block_select(q, keys, coarse_ratio=3, coarse_topc=4, **call)
    assert torch.equal(exhaustive.indices, all_groups.indices)
    assert torch.equal(all_groups.indices, by_loops(q, keys, mask, 45, 12, 1, 4, ("current",)))
    assert all_groups.plan.exhaustive
    assert "every block would be a candidate" in all_groups.plan.reason
    assert (all_groups.plan.coarse_topc, all_groups.plan.candidates, all_groups.plan.recall) == (4, 12, 1.0)
    cut = ki.hierarchical_block_select(q, keys, coarse_ratio=3, coarse_topc=1, **call)
    same = (cut.indices[..., None] == exhaustive.indices[..., None, :]) & cut.valid[..., None]
    assert cut.plan.recall == pytest.approx(float(same.any(-1).sum() / exhaustive.valid.sum()))
    assert 0 < cut.plan.recall <= 1


@pytest.mark.parametrize("name", ["causal", "documents", "window"])
def test_neither_the_future_nor_another_document_chooses(name, backend):
    """Large changes to tokens that query t may not see leave the bits of its selection alone."""
    mask = MASKS[name]()
    q, k = inputs()
    call = {"coarse_ratio": 3, "coarse_topc": 2, "final_topk": 3, "mask": mask, "block_size": SIZE, "backend": backend}
    allowed = mask.dense(2, 45)[:, 0]
    before = ki.hierarchical_block_select(q, block_means(k, SIZE, mask), **call).indices
    for t in (10, 17, 26, 44):
        hidden = ~allowed[:, t]
        if name == "window":  # a block that the window cuts stands for all of its keys
            first = int(allowed[0, t].nonzero()[0])
            hidden[:, first // SIZE * SIZE : t] = False
        changed = torch.where(hidden[..., None, None], 1e6 * torch.randn_like(k), k)
        after = ki.hierarchical_block_select(q, block_means(changed, SIZE, mask), **call).indices
        assert torch.equal(after[:, t], before[:, t]), t


def test_ties_go_to_the_smallest_index_and_nan_is_no_trap(backend):
    q, keys = torch.ones(1, 32, 1, 4), torch.zeros(1, 8, 1, 4)
    call = {"coarse_ratio": 2, "coarse_topc": 2, "final_topk": 3, "block_size": SIZE, "backend": backend}
    picked = ki.hierarchical_block_select(q, keys, **call)
    assert picked.indices[0, -1, 0].tolist() == [0, 1, 7]
    keys[0, 5] = float("nan")
    picked = ki.hierarchical_block_select(q, keys, **call)
    assert picked.indices[0, 16, 0].tolist() == [0, 1, 4]  # block 5 is in the future
    assert picked.indices[0, -1, 0].tolist() == [0, 5, 7]


def test_more_wanted_than_there_is():
    q, k = inputs(queries=5, keys=5)
    picked = ki.hierarchical_block_select(q, block_means(k, SIZE, ki.MaskContract()), final_topk=6, block_size=SIZE)
    assert picked.indices.shape == (2, 5, 2, 6)
    assert picked.indices[0, 4, 0].tolist() == [0, 1, -1, -1, -1, -1]
    assert picked.plan[:6] == (2, 1, 2, 1, 2, 2)
    assert not picked.indices.requires_grad


def test_chunks_of_queries_agree_with_the_whole(backend, monkeypatch):
    q, k = inputs()
    keys = block_means(k, SIZE, ki.MaskContract())
    call = {"coarse_ratio": 3, "coarse_topc": 2, "final_topk": 4, "block_size": SIZE, "recall": True}
    call["backend"] = backend
    whole = ki.hierarchical_block_select(q.requires_grad_(), keys, **call)
    for module in (chunked, reference):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 7 * 2 * 2 * 12)
    parts = ki.hierarchical_block_select(q, keys, **call)
    assert torch.equal(parts.indices, whole.indices)
    assert parts.plan == whole.plan


def test_one_graph():
    q, k = inputs()
    call = {"coarse_ratio": 3, "coarse_topc": 2, "final_topk": 4, "block_size": SIZE}

    def choose(q, k):
        picked = ki.hierarchical_block_select(q, block_means(k, SIZE, ki.MaskContract()), **call)
        return picked.indices, picked.valid

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k)[0], choose(q, k)[0])


REFUSALS = {
    "q must be [B, T, H, D], got shape (45, 4, 8)": {"q": torch.ones(45, 4, 8)},
    "block_keys must be [B, 12, K, D], the blocks of 45 keys, got shape (2, 11, 2, 8)": {
        "block_keys": torch.ones(2, 11, 2, 8)
    },
    "q must be of a multiple of block_keys' 3 heads, got 4": {"block_keys": torch.ones(2, 12, 3, 8)},
    "coarse_ratio must be at least 1, got 0": {"coarse_ratio": 0},
    "coarse_topc must be at least 1, got -3": {"coarse_topc": -3},
    "final_topk must be at least 2, got 1": {"final_topk": 1, "forced": ("current", "sink")},
    "final_topk must be an integer, got float": {"final_topk": 2.0},
    "forced must be one of 'current', 'sink', 'local', got 'first'": {"forced": ("first",)},
    "forced must be a tuple of current, sink, local, got 'current'": {"forced": "current"},
    "mask must be causal: a router takes past blocks and the current one, got causal=False": {
        "mask": ki.MaskContract(causal=False)
    },
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    good = {"q": torch.ones(2, 45, 4, 8), "block_keys": torch.ones(2, 12, 2, 8), "block_size": SIZE, "kv_len": 45}
    with pytest.raises((TypeError, ValueError)) as error:
        ki.hierarchical_block_select(**(good | REFUSALS[message]))
    assert str(error.value) == message
