"""``doc_window_mask``: the dense form of a mask in one call."""

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.mask import MaskContract


def doc_window_mask(
    batch_size: int,
    seq_len: int,
    *,
    device: torch.device | str,
    valid_token_counts: Tensor | list[int] | None = None,
    doc_ids: Tensor | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    causal: bool = True,
    kv_len: int | None = None,
    q_offset: int | None = None,
    allow_large: bool = False,
) -> Tensor:
    """Build one dense mask that respects causality, documents, valid prefixes and a local window.

    With ``p = t + q_offset`` the position of query t among the keys::

        mask[b, 0, t, s] = (not causal or s ≤ p) and p − left ≤ s ≤ p + right
                           and same_segment(b, p, s) and p < count[b] and s < count[b]

    A segment is a maximal run of equal ids; a token with a negative id is padding and attends to nothing.

    Args:
        batch_size: B.
        seq_len: T, the number of queries.
        device: device of the mask; ids and counts are copied to it.
        valid_token_counts: valid leading tokens of each row, integers [B]; None for all.
        doc_ids: integers [B, S], or [S] for every row alike.
        window_size: ``(left, right)`` tokens; negative or None is unlimited.
        causal: no query attends to a later position.
        kv_len: S, the number of keys; T by default.
        q_offset: the position of query 0 among the keys; None aligns the last query with the last key.
        allow_large: build the mask above T = 8192 too.

    Returns:
        Bool [B, 1, T, S], True where the query may attend, always with the batch dimension.

    Raises:
        ValueError: sizes that contradict each other, a device that this machine does not have, or T above 8192
            (``dense_mask_too_large``, with the bytes).
        TypeError: ids or counts that are not integers.

    Source: the window convention is FlashAttention's.

    >>> import torch, kernel_index as ki
    >>> ki.doc_window_mask(1, 4, device="cpu", doc_ids=torch.tensor([[0, 0, 1, -1]]))[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """
    checks.is_int("batch_size", batch_size, minimum=0)
    checks.is_int("seq_len", seq_len, minimum=0)
    checks.is_device("device", device)
    checks.has_values("doc_ids", doc_ids, device)
    checks.has_values("valid_token_counts", valid_token_counts, device)
    validity = None if valid_token_counts is None else attention_validity(valid_token_counts=valid_token_counts)
    mask = MaskContract(causal, window_size, doc_ids, validity, q_offset).to(device)
    keys = seq_len if kv_len is None else kv_len
    return mask.dense(batch_size, seq_len, keys, device=device, allow_large=allow_large)
