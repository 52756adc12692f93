"""Documents from cumulative lengths: searched on their device, so that nothing waits for it."""

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import Documents


def ids_of_lengths(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The document of each token, int64 [1, tokens]; −1 after the last."""
    return _document(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens)[None]


def _document(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Documents without tokens are passed over: a token belongs to the last one that begins at it or before it."""
    lengths = cu_seqlens.to(tokens.dtype).contiguous()
    found = torch.searchsorted(lengths, tokens, right=True) - 1
    return torch.where(tokens < lengths[-1], found, -1)


def position_in_keys(queries: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """The position of each query among the keys, int64 [1, n]: the last of a document is at its last key."""
    document = _document(queries, cu_seqlens_q).clamp(min=0) + 1
    of_keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if of_keys.shape[0] == 1:
        return queries[None]
    q_end, k_end = (x.to(torch.int64).index_select(0, document) for x in (cu_seqlens_q, of_keys))
    return (queries + (k_end - q_end))[None]


def documents_of_lengths(queries: Tensor, keys: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> Documents:
    """The keys of each query's document; a query after the last document is outside.

    Lengths beyond the S keys, which the host may not have read, end at them.
    """
    of_keys = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).to(torch.int64).clamp(0, keys)
    document = _document(queries, cu_seqlens_q)
    if of_keys.shape[0] == 1:
        nothing = torch.zeros_like(queries)[None]
        return Documents(nothing, nothing, torch.ones_like(nothing, dtype=torch.bool))
    at = document.clamp(min=0)
    low, high = of_keys.index_select(0, at)[None], of_keys.index_select(0, at + 1)[None]
    return Documents(low, high, (document < 0)[None])
