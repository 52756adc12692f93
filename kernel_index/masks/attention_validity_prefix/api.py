"""``attention_validity``: the valid prefix of each row from counts of tokens, of blocks, or of both."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kernel_index.masks.attention_validity_prefix import contract
from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity


def attention_validity(
    *,
    attention_meta: Mapping[str, Any] | None = None,
    valid_token_counts: Tensor | list[int] | None = None,
    valid_slot_counts: Tensor | list[int] | None = None,
    base_block_tokens: int | None = None,
) -> AttentionValidity:
    """Normalise valid-token and valid-slot prefix metadata.

    Slot counts make mode ``slot_prefix``, token counts alone ``token_prefix``, neither ``none``::

        valid tokens of a row = min(slots × base_block_tokens, tokens, row length)

    Absent (None) never becomes zero: zeros say that no token of the row is valid.

    Args:
        attention_meta: a mapping that may hold ``row_valid_token_counts``, ``row_valid_slot_counts`` and
            ``base_block_tokens``; other keys are ignored.  A keyword that is given replaces the mapping's field.
        valid_token_counts: valid leading tokens of each row, integers [B]; a scalar is a batch of one.  An int64 tensor
            is kept, not copied.
        valid_slot_counts: valid leading blocks of each row, integers [B].
        base_block_tokens: tokens for each block; slot counts need it.

    Returns:
        An immutable ``AttentionValidity`` with int64 counts.

    Raises:
        TypeError: a count is not an integer (floats and bools are not).
        ValueError: a count has more than one dimension or is negative, the two counts differ in length, or slot counts
            come without a positive ``base_block_tokens``.  Counts on an accelerator are never read: a negative one
            there acts as 0.

    Source: the padding contract of packed training batches (prefix lengths instead of a dense padding mask).

    >>> import torch, kernel_index as ki
    >>> valid = ki.attention_validity(valid_slot_counts=[2, 1], valid_token_counts=[7, 4], base_block_tokens=4)
    >>> valid.mode, valid.token_counts(8).tolist()
    ('slot_prefix', [7, 4])
    >>> valid.resolve(tile_size=16).reason
    'slot_tile_mismatch'
    """
    if attention_meta is not None and not isinstance(attention_meta, Mapping):
        raise TypeError(f"attention_meta must be a mapping, got {type(attention_meta).__name__}")
    meta: Mapping[str, Any] = attention_meta or {}

    def field(keyword: Any, key: str) -> Any:
        return meta.get(key) if keyword is None else keyword

    token_prefix = contract.counts("valid_token_counts", field(valid_token_counts, "row_valid_token_counts"))
    slot_counts = contract.counts("valid_slot_counts", field(valid_slot_counts, "row_valid_slot_counts"))
    block_tokens = contract.block_tokens(field(base_block_tokens, "base_block_tokens"))
    contract.check_same_rows(token_prefix, slot_counts)
    if slot_counts is not None:
        return AttentionValidity("slot_prefix", token_prefix, slot_counts, block_tokens)
    if token_prefix is not None:
        return AttentionValidity("token_prefix", token_prefix, None, block_tokens)
    return AttentionValidity("none", None, None, block_tokens)
