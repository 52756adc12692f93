"""A prefix tree for the invariant form of attention: each path is gathered and attended to as a document.

So a token of a tree has the bits that it has on its path alone, wherever its run stands in the row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.document_attention import Bounds, Scoring, attend_to_documents
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.masks.doc_window_mask.fields import as_rows


class _Stretch(NamedTuple):
    """Consecutive queries of one row whose keys are the first ones of one path."""

    queries: slice
    keys: Tensor  # int64 [n], places in the row
    bounds: Bounds  # of the queries among these keys, int32 [1, queries]


def attend_to_paths(call: AttentionCall, scoring: Scoring) -> OutAndLse:
    rows = [_row(call, b, scoring) for b in range(call.q.shape[0])]
    outs, lses = zip(*rows, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _row(call: AttentionCall, b: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
    one = slice(b, b + 1)
    q, k, v = call.q[one], call.k[one], call.v[one]
    found = [
        attend_to_documents(
            q[:, s.queries], k.index_select(1, s.keys), v.index_select(1, s.keys), call.sink, s.bounds, scoring
        )
        for s in _stretches(call, b)
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _stretches(call: AttentionCall, b: int) -> Iterator[_Stretch]:
    """A query sees the keys of its path from ``start`` to ``end`` of the contract's bounds."""
    mask, sizes = call.mask, call.sizes
    tokens = sizes.keys
    start, end, _ = mask.row_bounds(sizes)
    origin, parent = mask.row_origins(sizes), mask.tree_parents(sizes.batch, tokens)
    start, end, origin, parent = (x[b % len(x)] for x in (start, end, origin, parent))
    until = as_rows(mask.subtree_end)
    index = torch.arange(tokens, device=start.device)
    until = torch.full_like(index, tokens) if until is None else until[b % len(until)].to(torch.int64)
    is_gap = until <= index
    continues = torch.where(is_gap[1:], is_gap[:-1], parent[1:] == index[:-1]) & (origin[1:] == origin[:-1])
    first = torch.cat((index.new_zeros(1), 1 + (~continues).nonzero().flatten()))
    for begin, stop in zip(first.tolist(), [*first[1:].tolist(), tokens], strict=True):
        seen = (until > stop - 1) & (index >= origin[stop - 1]) & (index < end[stop - 1])
        keys, queries = seen.nonzero().flatten(), slice(begin, stop)
        low, high = (torch.searchsorted(keys, x[queries].to(torch.int64)).to(torch.int32)[None] for x in (start, end))
        yield _Stretch(queries, keys, Bounds(torch.minimum(low, high), high, torch.zeros_like(low)))
