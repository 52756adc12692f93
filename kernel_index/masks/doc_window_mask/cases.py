"""Named mask contracts, and an oracle that decides one (query, key) pair at a time, without intervals."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity
from kernel_index.masks.doc_window_mask.mask import MaskContract

SUITES = ()  # a mask is metadata: it has no backends of its own  # fmt: skip

PACKED = ((7, 7, 7, 4, 4, 7, 7, 7, -1, 9, 9, 9, -1), (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))


def may_attend(mask: MaskContract, row: int, query: int, key: int, queries: int, keys: int) -> bool:
    """Whether a query may attend to a key, in plain Python."""
    position = query + (keys - queries if mask.q_offset is None else mask.q_offset)
    left, right = mask.window
    if mask.causal and key > position:
        return False
    if left is not None and key < position - left:
        return False
    if right is not None and key > position + right:
        return False
    if mask.doc_ids is not None and not _same_document(mask.doc_ids, row, position, key):
        return False
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
)
