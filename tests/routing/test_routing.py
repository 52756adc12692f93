"""Which blocks are legal, the mean key of a block, and the best blocks."""

import pytest
import torch

import kernel_index as ki
from kernel_index.routing import topk_keys
from kernel_index.routing.legal_blocks import LegalBlocks, block_means, legal_blocks, top_blocks

MASKS = {
    "causal": ki.MaskContract(),
    "documents": ki.MaskContract(doc_ids=torch.tensor([[0] * 7 + [1] * 9 + [-1] * 2 + [0] * 5])),
    "window": ki.MaskContract(window=(6, 0)),
    "prefix": ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[17])),
    "later": ki.MaskContract(q_offset=9),
}


@pytest.mark.parametrize("name", MASKS)
def test_legal_blocks_are_past_and_hold_a_key_that_the_mask_allows(name):
    mask, keys, size = MASKS[name], 23, 4
    queries = 14 if name == "later" else keys
    sizes = mask.sizes(1, queries, keys, torch.device("cpu"))
    legal = legal_blocks(mask, sizes, size)
    allowed = mask.dense(1, queries, keys, device="cpu")[0, 0]
    for t in range(queries):
        own = (t + sizes.offset) // size
        seen = {s // size for s in allowed[t].nonzero().flatten().tolist()}
        first, current = int(legal.first[0, t]), int(legal.current[0, t])
        assert set(range(first, current)) == {j for j in seen if j < own}
        assert current == (own if seen else -1)


def by_hand(scores, legal, topk):
    rows = []
    for row, first, current in zip(scores.tolist(), legal.first[0].tolist(), legal.current[0].tolist(), strict=True):
        past = sorted(range(first, max(first, current)), key=lambda j: (-row[j], j))
        own = [current] if 0 <= current < len(row) else []
        rows.append(sorted((own + past)[:topk]))
    return rows


@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "infinite", "nan"])
@pytest.mark.parametrize("topk", [1, 3, 9])
def test_top_blocks_are_exact_on_both_paths(kind, topk, monkeypatch):
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 8, generator=g)
    if kind == "ties":
        scores = scores.round()
    elif kind == "zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    elif kind == "infinite":
        scores[:, 2], scores[:, 3], scores[5] = torch.inf, torch.inf, -torch.inf
    elif kind == "nan":
        scores[7, 1] = torch.nan
    current = torch.arange(40)[None] % 10 - 1  # −1: nothing; 8: behind the last block
    first = torch.minimum(torch.arange(40)[None] % 3, current.clamp(min=0))
    legal = LegalBlocks(first.int(), current.int())
    found = top_blocks(scores[None, :, None], legal, topk)
    assert found.indices.shape == found.valid.shape == (1, 40, 1, topk)
    assert torch.equal(found.valid, found.indices >= 0)
    if kind != "nan":
        picked = [[j for j in row if j >= 0] for row in found.indices[0, :, 0].tolist()]
        assert picked == by_hand(scores, legal, topk)
    monkeypatch.setattr(topk_keys, "host_readable", lambda scores: False)
    for a, b in zip(found, top_blocks(scores[None, :, None], legal, topk), strict=True):
        assert torch.equal(a, b)


def test_a_block_where_documents_meet_stands_for_the_last_of_them():
    k = torch.arange(10.0).view(1, 10, 1, 1)
    mask = ki.MaskContract(doc_ids=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]))
    assert block_means(k, 4, mask).flatten().tolist() == [1.5, 6.0, 8.5]
    assert block_means(k, 4, ki.MaskContract()).flatten().tolist() == [1.5, 5.5, 8.5]


def test_only_causal_masks_are_routed():
    mask = ki.MaskContract(causal=False)
    with pytest.raises(ValueError, match="mask must be causal"):
        legal_blocks(mask, mask.sizes(1, 4, 4, torch.device("cpu")), 2)
