"""Named mask contracts, and an oracle that decides one (query, key) pair at a time, without intervals."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.api import pack_tree
from kernel_index.masks.prefix_tree.packing import TreePacking

SUITES = ()  # a mask is metadata: it has no backends of its own  # fmt: skip

PACKED = ((7, 7, 7, 4, 4, 7, 7, 7, -1, 9, 9, 9, -1), (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))


def may_attend(mask: MaskContract, row: int, query: int, key: int, queries: int, keys: int) -> bool:
    """Whether a query may attend to a key, in plain Python."""
    position = _position(mask, row, query, queries, keys)
    if mask.cu_seqlens is not None and not _same_run(mask, query, key):
        return False
    if mask.doc_ids is not None and not _same_document(mask.doc_ids, row, position, key):
        return False
    if not _is_valid(mask, row, query, position, key):
        return False
    if mask.is_tree:
        return _on_path(mask, row, position, key)
    left, right = mask.window
    first = _first_of_document(mask, row, position)
    if mask.prefix is not None and first <= min(position, key) and max(position, key) < first + _of(mask.prefix, row):
        return True
    if mask.causal and key > position:
        return False
    if left is not None and key < position - left:
        return False
    return right is None or key <= position + right


def _of(value: Any, row: int) -> int:
    """The number of a row, from one for all or one for each."""
    return int(value[row]) if isinstance(value, Tensor) else value


def _row(value: Tensor, row: int) -> list[int]:
    return (value if value.ndim == 1 else value[row]).tolist()


def _position(mask: MaskContract, row: int, query: int, queries: int, keys: int) -> int:
    if mask.cu_seqlens is None or mask.cu_seqlens[1] is None:
        return query + (keys - queries if mask.q_offset is None else _of(mask.q_offset, row))
    ends = next((ends for ends in zip(*(x[1:].tolist() for x in _lists(mask)), strict=True) if query < ends[0]), (0, 0))
    return query + ends[1] - ends[0]


def _lists(mask: MaskContract) -> tuple[Tensor, Tensor]:
    assert mask.cu_seqlens is not None
    of_queries, of_keys = mask.cu_seqlens
    return of_queries, of_queries if of_keys is None else of_keys


def _same_run(mask: MaskContract, query: int, key: int) -> bool:
    """Whether both are in one document of the cumulative lengths."""
    places = [
        next((d for d in range(len(x) - 1) if x[d] <= at < x[d + 1]), -1)
        for x, at in zip((x.tolist() for x in _lists(mask)), (query, key), strict=True)
    ]
    return places[0] == places[1] >= 0


def _first_of_document(mask: MaskContract, row: int, position: int) -> int:
    if mask.cu_seqlens is not None:
        return max((first for first in _lists(mask)[1].tolist() if first <= position), default=0)
    if mask.doc_ids is None:
        return 0
    ids, first = _row(mask.doc_ids, row), position
    while first > 0 and ids[first - 1] == ids[position]:
        first -= 1
    return first


def _on_path(mask: MaskContract, row: int, position: int, key: int) -> bool:
    if key > position or (mask.subtree_end is not None and position >= _row(mask.subtree_end, row)[key]):
        return False
    if mask.window[0] is None:
        return True
    along = range(10**6) if mask.positions is None else _row(mask.positions, row)
    return 0 <= position < len(along) and along[position] - along[key] <= mask.window[0]


def _is_valid(mask: MaskContract, row: int, query: int, position: int, key: int) -> bool:
    valid = mask.validity
    if mask.key_validity is not None and mask.key_validity.mode != "none":
        return key < _count(mask.key_validity, row) and (valid is None or query < _count(valid, row))
    if valid is not None and valid.mode != "none":
        return 0 <= position < _count(valid, row) and key < _count(valid, row)
    return True


def _count(valid: AttentionValidity, row: int) -> float:
    limits: list[float] = [math.inf]
    if valid.token_prefix is not None:
        limits.append(int(valid.token_prefix[row]))
    if valid.slot_counts is not None and valid.base_block_tokens is not None:
        limits.append(int(valid.slot_counts[row]) * valid.base_block_tokens)
    return min(limits)


def _same_document(doc_ids: Tensor, row: int, position: int, key: int) -> bool:
    ids = (doc_ids if doc_ids.ndim == 1 else doc_ids[row]).tolist()
    if not 0 <= position < len(ids) or ids[position] < 0:
        return False
    low, high = sorted((position, key))
    return all(i == ids[position] for i in ids[low : high + 1])


def dense_oracle(mask: MaskContract, batch: int, queries: int, keys: int) -> Tensor:
    """Bool [B, T, S] from ``may_attend``."""
    allowed = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for t in range(queries):
            for s in range(keys):
                allowed[b, t, s] = may_attend(mask, b, t, s, queries, keys)
    return allowed


def on_each_path(oracle: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, **call: Any):
    """What ``oracle`` gives the last query of each path of a tree, computed over that path alone; 0 in a gap."""
    nothing = (q.sum() + k.sum() + v.sum()) * 0.0
    out = nothing.expand(*q.shape[:3], v.shape[3]).clone()
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        path = _path_of(mask, b, t)
        if path:
            alone = (x[b : b + 1, path] for x in (q, k, v))
            out[b, t] = oracle(*alone, mask=alone_on(mask, b, path), **call)[0, -1]
    return out


def _path_of(mask: MaskContract, row: int, query: int) -> list[int]:
    """The tokens of a query's path, itself the last; none for a gap."""
    if mask.subtree_end is None:
        return list(range(query + 1))
    ends = _row(mask.subtree_end, row)
    return [s for s in range(query + 1) if query < ends[s]] if query < ends[query] else []


def alone_on(mask: MaskContract, row: int, path: list[int]) -> MaskContract:
    """The contract of a path of a tree as a row of its own: its window, documents and valid tokens."""
    ids: list[int] | None = None
    if mask.doc_ids is not None:
        of_row = _row(mask.doc_ids, row)
        document = list(itertools.accumulate((a != b for a, b in itertools.pairwise(of_row)), initial=0))
        ids = [document[s] if of_row[s] >= 0 else -1 for s in path]
    if mask.validity is not None:
        ids = [i if s < _count(mask.validity, row) else -1 for s, i in zip(path, ids or [0] * len(path), strict=True)]
    return MaskContract(window=mask.window, doc_ids=None if ids is None else torch.tensor([ids]))


@dataclass(frozen=True)
class MaskCase:
    """A contract for given sizes: ``build(T, S)``, for two rows."""

    name: str
    why: str
    build: Callable[[int, int], MaskContract]


def packed(length: int) -> Tensor:
    """Two rows of ids: one with a repeated id and with padding inside and at the end, one with a single document."""
    repeats = -(-length // len(PACKED[0]))
    return torch.tensor(PACKED).repeat(1, repeats)[:, :length].contiguous()


def forest(length: int) -> TreePacking:
    """Two trees in a row of ``length`` tokens: a deep and ragged one, and one of a root with a leaf at least."""
    parents, shares = [-1, 0, 1, 2, 1, 0, -1, 6, 6], [3, 2, 1, 2, 1, 2, 1, 1, 2]
    cuts = [length * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
    lengths = [b - a for a, b in itertools.pairwise(cuts)]
    return pack_tree(*_without_empty(parents, lengths))


def _without_empty(parents: list[int], lengths: list[int]) -> tuple[list[int], list[int]]:
    """A run without tokens is left out, and what continues it continues its parent."""
    kept, number = list[int](), dict[int, int]()
    for run, length in enumerate(lengths):
        parent = parents[run]
        number[run] = len(kept) if length else (number[parent] if parent >= 0 else -1)
        if length:
            kept.append(run)
    above = [number[parents[run]] if parents[run] >= 0 else -1 for run in kept]
    return above, [lengths[run] for run in kept]


def tree_fields(length: int) -> dict[str, Any]:
    """``subtree_end`` and ``positions`` of two rows: a forest, and a prompt with leaves at aligned places and gaps."""
    tree = forest(length)
    star = pack_tree([-1, 0, 0, 0], [max(length // 4, 1)] * 4, align=3)
    ends, along = (
        torch.stack([getattr(tree, name), _fitted(getattr(star, name), length)])
        for name in ("subtree_end", "positions")
    )
    index = torch.arange(length)
    return {"subtree_end": torch.maximum(ends, index), "positions": torch.where(ends > index, along, 0)}


def chain_fields(length: int) -> dict[str, Any]:
    """``subtree_end`` and ``positions`` of two rows: a chain of three runs, and two chains."""
    third, half = length // 3, length // 2
    trees = (
        _without_empty([-1, 0, 1], [third, third, length - 2 * third]),
        _without_empty([-1, -1], [half, length - half]),
    )
    packings = [pack_tree(*tree) for tree in trees]
    return {name: torch.stack([getattr(p, name) for p in packings]) for name in ("subtree_end", "positions")}


def _fitted(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x[:length].clamp(max=length), (0, max(0, length - len(x))))


CASES = (
    MaskCase(
        "packed",
        "documents, one id of which is repeated; padding inside and at the end",
        lambda t, s: MaskContract(doc_ids=packed(s)),
    ),
    MaskCase("causal", "causality alone", lambda t, s: MaskContract()),
    MaskCase("full", "every key is allowed", lambda t, s: MaskContract(causal=False)),
    MaskCase("window", "a local layer", lambda t, s: MaskContract(window=(3, 0))),
    MaskCase("both_sides", "a window around the query, without causality", lambda t, s: MaskContract(False, (2, 3))),
    MaskCase("ahead", "a bound on following tokens only", lambda t, s: MaskContract(False, (-1, 2))),
    MaskCase("self_only", "left=0 allows the token itself only", lambda t, s: MaskContract(window=(0, 0))),
    MaskCase("shared_ids", "one rank-1 row of ids for every row", lambda t, s: MaskContract(doc_ids=packed(s)[0])),
    MaskCase(
        "prefix",
        "a padded batch with an empty row",
        lambda t, s: MaskContract(validity=attention_validity(valid_token_counts=[s // 2, 0])),
    ),
    MaskCase(
        "slots",
        "blocks of 4, the last one trimmed",
        lambda t, s: MaskContract(
            validity=attention_validity(valid_slot_counts=[2, 1], valid_token_counts=[7, 4], base_block_tokens=4)
        ),
    ),
    MaskCase(
        "all",
        "documents, window and prefix at once",
        lambda t, s: MaskContract(True, (4, 0), packed(s), attention_validity(valid_token_counts=[s, s - s // 3])),
    ),
    MaskCase(
        "padded_source",
        "a prefix of the keys alone: every query attends to it, as in cross-attention",
        lambda t, s: MaskContract(False, key_validity=attention_validity(valid_token_counts=[s // 2, 0])),
    ),
    MaskCase(
        "ragged",
        "rows that differ in queries and in keys, with documents and a window",
        lambda t, s: MaskContract(
            True,
            (4, 0),
            packed(s),
            attention_validity(valid_token_counts=[t, t // 2]),
            key_validity=attention_validity(valid_token_counts=[s - s // 3, s]),
        ),
    ),
    MaskCase("offset", "query 0 at key 2", lambda t, s: MaskContract(q_offset=2)),
    MaskCase(
        "before", "queries before the first key: empty rows at the beginning", lambda t, s: MaskContract(q_offset=-3)
    ),
    MaskCase(
        "behind",
        "queries after the last key, with a window: empty rows at the end",
        lambda t, s: MaskContract(window=(4, 0), q_offset=s // 2),
    ),
    MaskCase(
        "row_offsets",
        "rows whose queries stand at different keys",
        lambda t, s: MaskContract(q_offset=torch.tensor([s - t, 1])),
    ),
    MaskCase(
        "prefix_lm",
        "the first tokens of each document see each other in both directions",
        lambda t, s: MaskContract(window=(2, 0), doc_ids=packed(s), prefix=torch.tensor([2, 5])),
    ),
    MaskCase("whole_prefix", "a prefix of every row alike", lambda t, s: MaskContract(prefix=4)),
    MaskCase(
        "chain",
        "trees without a branch: intervals, with a window along the path",
        lambda t, s: MaskContract(window=(4, 0), **chain_fields(s)),
    ),
    MaskCase(
        "tree",
        "shared prompts: keys are seen along a path alone",
        lambda t, s: MaskContract(subtree_end=tree_fields(s)["subtree_end"]),
    ),
    MaskCase("tree_window", "a window along the path", lambda t, s: MaskContract(window=(3, 0), **tree_fields(s))),
    MaskCase(
        "tree_all",
        "a tree with documents, a window and a valid prefix",
        lambda t, s: MaskContract(
            True, (4, 0), packed(s), attention_validity(valid_token_counts=[s, s - s // 3]), **tree_fields(s)
        ),
    ),
)
