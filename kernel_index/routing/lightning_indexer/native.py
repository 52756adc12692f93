"""The indexer's selection on a CPU in C++: scores of a tile of keys stay in a core's cache until they are compared.

Up to 16 queries use plain dot products instead: each thread takes a slice of the keys, and a query keeps one row of
scores.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernel_index.core import native

SOURCE = Path(__file__).with_name("indexer.cpp")

ONE_THREAD = 1 << 20
"""Up to this many multiplications one thread is done before a second one has begun."""


def native_topk(q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices int64 and scores float32 [B, T, topk], best first; ``start`` and ``end`` int32 [B or 1, T]."""
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    # A trace that has been compiled may be run on views with the negative bit.
    q, k, weights = (x.resolve_neg().to(torch.float32).contiguous() for x in (q, k, weights))
    start, end = start.contiguous(), end.contiguous()
    indices, scores = (
        q.new_empty(batch, queries, topk, dtype=torch.int64),
        q.new_empty(batch, queries, topk, dtype=torch.float32),
    )
    threads = torch.get_num_threads() if q.numel() * keys > ONE_THREAD else 1
    sizes = (batch, queries, keys, heads, width, topk, start.shape[0], threads)
    native.call(SOURCE, "index_keys", sizes, (), start, end, q, k, weights, indices, scores)
    return indices, scores
