"""Legal mask contracts of every kind of field, trees among them, and what they must mean."""

import itertools
import random
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.masks.doc_window_mask.cases import dense_oracle
from tests.fuzz.draws import B, T, floats, whole

QUERIES = 3
"""Fewer than keys: they are the last ones, unless the contract places them elsewhere."""

PACKED, PACKED_KEYS = 7, 9


def forest(rng: random.Random, tokens: int) -> ki.TreePacking:
    """Trees of at most so many tokens, gaps counted: chains, stars, deep and ragged ones."""
    parents, lengths = [-1], [rng.randrange(1, tokens + 1)]
    while (left := tokens - sum(lengths)) > 0 and rng.random() < 0.8:
        parents.append(rng.randrange(-1, len(parents)))
        lengths.append(rng.randrange(1, min(left, 4) + 1))
    found = ki.pack_tree(parents, lengths, align=rng.choice([1, 1, 2, 3]))
    return found if len(found.positions) <= tokens else ki.pack_tree(parents, lengths)


def tree_fields(rng: random.Random, batch: int, keys: int) -> dict[str, Tensor]:
    """``subtree_end`` and ``positions``, of each row or of all alike; shorter trees end in gaps."""
    ends, along = torch.arange(keys).repeat(batch, 1), torch.zeros(batch, keys, dtype=torch.int64)
    for row in range(batch if keys else 0):
        found = forest(rng, keys)
        used = len(found.positions)
        ends[row, :used], along[row, :used] = found.subtree_end, found.positions
    fields = {"subtree_end": ends, "positions": along}
    return {name: x[0] for name, x in fields.items()} if batch and rng.random() < 0.3 else fields


def valid(rng: random.Random, batch: int, tokens: int) -> ki.AttentionValidity:
    return ki.attention_validity(valid_token_counts=whole(rng, 0, tokens + 1, batch))


def contract(rng: random.Random) -> dict[str, Any]:
    """Fields that may stand together; documents, which may end anywhere, are always among them."""
    more: dict[str, Any] = rng.choice([
        {},
        {"prefix": rng.choice([2, torch.tensor([1, 3])])},
        {"key_validity": valid(rng, B, T), "validity": rng.choice([None, valid(rng, B, QUERIES)])},
        {"validity": valid(rng, B, T)},
        tree_fields(rng, B, T),
        {"subtree_end": tree_fields(rng, B, T)["subtree_end"]},
        {"positions": torch.arange(T) * 2},
        {"key_validity": valid(rng, B, T), **tree_fields(rng, B, T)},
    ])  # fmt: skip
    return {
        "causal": True,
        "window": rng.choice([(2, 0), (None, 0), (0, 0)]),
        "doc_ids": rng.choice([whole(rng, -1, 3, B, T), torch.zeros(T, dtype=torch.int64)]),
        "q_offset": rng.choice([None, 1, torch.tensor([0, 2])]),
        **more,
    }


def lowered(**fields: Any) -> tuple[ki.MaskContract, Tensor]:
    """The contract, and the mask that it means for B rows."""
    mask = ki.MaskContract(**fields)
    return mask, mask.dense(B, QUERIES, T)


def check_lowered(kwargs: dict[str, Any], found: tuple[ki.MaskContract, Tensor]) -> None:
    mask, dense = found
    assert torch.equal(dense[:, 0], dense_oracle(mask, *dense[:, 0].shape))


def lengths(rng: random.Random) -> dict[str, Any]:
    """Cumulative lengths, empty documents and padding at the end among them."""

    def ends(tokens: int) -> Tensor:
        return torch.tensor([0, *sorted(rng.randrange(tokens + 1) for _ in range(3))], dtype=torch.int32)

    queries = ends(PACKED)
    return {
        "cu_seqlens_q": queries,
        "cu_seqlens_k": rng.choice([None, ends(PACKED_KEYS)]),
        "causal": rng.random() < 0.7,
        "window": rng.choice([(None, None), (2, 0), (1, 1)]),
    }


def of_lengths(**fields: Any) -> tuple[ki.MaskContract, Tensor]:
    mask = ki.MaskContract.from_cu_seqlens(**fields)
    return mask, mask.dense(1, PACKED, PACKED if fields["cu_seqlens_k"] is None else PACKED_KEYS)


def restarts(rng: random.Random) -> dict[str, Any]:
    """Positions that begin again, at 0 or elsewhere."""
    starts = [[rng.random() < 0.3 for _ in range(T)] for _ in range(B)]
    rows = [[0 if s else t for t, s in enumerate(row)] for row in starts]
    return {"position_ids": rng.choice([torch.tensor(rows), torch.tensor(rows[0])]), "causal": rng.random() < 0.7}


def of_positions(**fields: Any) -> tuple[ki.MaskContract, Tensor]:
    mask = ki.MaskContract.from_position_ids(**fields)
    return mask, mask.dense(B, T, T)


def check_positions(kwargs: dict[str, Any], found: tuple[ki.MaskContract, Tensor]) -> None:
    """From the definition: two tokens of one document have positions between them that only increase."""
    position_ids = kwargs["position_ids"].expand(B, -1).tolist()
    for row, ids in enumerate(position_ids):
        for q in range(T):
            for k in range(T):
                between = ids[min(q, k) : max(q, k) + 1]
                together = all(a < b for a, b in itertools.pairwise(between))
                assert bool(found[1][row, 0, q, k]) == (together and (k <= q or not kwargs["causal"]))


def paths(rng: random.Random) -> dict[str, Any]:
    """Sums over the tokens of each path."""
    x = floats(rng, B, T)
    return {
        "run": lambda q, k, mask: k.cumsum(1)[:, k.shape[1] - q.shape[1] :],
        "mask": ki.MaskContract(**tree_fields(rng, B, T)),
        "by_query": (x,),
        "by_key": (x,),
    }


def check_paths(kwargs: dict[str, Any], found: tuple[Tensor, ...]) -> None:
    ends = kwargs["mask"].subtree_end.expand(B, -1).tolist()
    for row in range(B):
        for t in range(T):
            path = [s for s in range(t + 1) if t < ends[row][s]] if t < ends[row][t] else []
            assert abs(float(found[0][row, t] - kwargs["by_key"][0][row, path].sum())) < 1e-5
