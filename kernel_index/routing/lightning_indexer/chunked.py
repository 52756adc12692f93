"""The indexer in PyTorch, by tiles: a chunk of queries against a tile of keys, and the best keys so far.

Nothing of size T·S is ever stored.  Scores are packed with their indices (``topk_keys``), so the running top-k is exact
whatever the tiles, and ties have one winner.  Backward fetches the selected keys, one chunk of queries at a time.
"""

import torch
from torch import Tensor

from kernel_index.routing.topk_keys import NOTHING, best_keys, index_of, score_of

CHUNK = 64
"""Queries of a chunk; on a GPU, where a launch costs what a chunk of few keys does, as many as make a tile."""

ELEMENTS = 1 << 22
"""Products of a tile, or fetched numbers of a chunk, at once; 16 times as many on a GPU."""


def _at_once(like: Tensor) -> int:
    return ELEMENTS if like.device.type == "cpu" else 16 * ELEMENTS


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _visible(start: Tensor, end: Tensor, t: slice, keys: int, window: tuple[int, int, int]) -> tuple[int, int]:
    """The keys that some query of a chunk may see: from the bounds on the host, else from causality and window."""
    if start.device.type == "cpu":
        return int(start[:, t.start].min()), int(end[:, t.stop - 1].max())
    offset, left, right = window
    low = max(0, t.start + offset - left) if left >= 0 else 0
    high = min(keys, t.stop + offset + right) if right >= 0 else keys
    return low, max(low, high)


def run_topk(
    q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, topk: int, offset: int, left: int, right: int
) -> tuple[Tensor, Tensor]:
    """Indices int64 and scores float32 [B, T, topk], best first."""
    batch, queries, heads, _ = q.shape
    keys, kept = k.shape[1], min(topk, k.shape[1])
    indices, scores = allocate_topk(q, k, weights, start, end, topk)
    indices.fill_(-1)
    scores.fill_(-torch.inf)
    chunk = CHUNK if q.device.type == "cpu" else max(CHUNK, _at_once(q) // max(1, batch * heads * keys))
    tile = max(256, _at_once(q) // max(1, batch * chunk * heads))
    k = _wide(k)
    for t0 in range(0, queries, chunk):
        t = slice(t0, min(t0 + chunk, queries))
        low, high = _visible(start, end, t, keys, (offset, left, right))
        best = torch.empty((batch, t.stop - t.start, 0), dtype=torch.int64, device=q.device)
        for s0 in range(low, high, tile):
            key = torch.arange(s0, min(s0 + tile, high), device=q.device)
            z = torch.einsum("btjd,bsd->btjs", _wide(q[:, t]), k[:, s0 : s0 + key.shape[0]]).relu_()
            tile_scores = torch.einsum("btjs,btj->bts", z, _wide(weights[:, t]))
            allowed = (key >= start[:, t, None]) & (key < end[:, t, None])
            best = torch.cat([best, best_keys(tile_scores, allowed, key, min(kept, key.shape[0]))], -1)
            best = torch.topk(best, min(kept, best.shape[-1]), sorted=False).values
        best = best.sort(-1, descending=True).values
        exists = best > NOTHING
        indices[:, t, : best.shape[-1]] = torch.where(exists, index_of(best), -1)
        scores[:, t, : best.shape[-1]] = torch.where(exists, score_of(best), -torch.inf)
    return indices, scores


def _fetched(k: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The selected keys [B, t, n, D], and their rows among all keys of the batch; −1 fetches row 0."""
    first = torch.arange(k.shape[0], device=k.device)[:, None, None] * k.shape[1]
    rows = (indices.clamp(min=0) + first).flatten()
    return _wide(k.flatten(0, 1).index_select(0, rows)).view(*indices.shape, k.shape[2]), rows


def _chunks(q: Tensor, indices: Tensor) -> list[slice]:
    step = max(1, _at_once(q) // max(1, q.shape[0] * indices.shape[2] * max(q.shape[2], q.shape[3])))
    return [slice(t, min(t + step, q.shape[1])) for t in range(0, q.shape[1], step)]


def run_scores(q: Tensor, k: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    scores = allocate_scores(q, k, weights, indices)
    if k.shape[1] == 0:
        return scores.fill_(-torch.inf)
    for t in _chunks(q, indices):
        z = torch.einsum("btjd,btnd->btjn", _wide(q[:, t]), _fetched(k, indices[:, t])[0]).relu_()
        found = torch.einsum("btjn,btj->btn", z, _wide(weights[:, t]))
        scores[:, t] = found.masked_fill(indices[:, t] < 0, -torch.inf)
    return scores


def run_backward(g: Tensor, q: Tensor, k: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks in order, the tokens of a chunk in order: dk has the same bits every time."""
    d_q, d_w = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, weights))
    d_k = torch.zeros((k.shape[0] * k.shape[1], k.shape[2]), dtype=_wide(k[:0]).dtype, device=k.device)
    for t in _chunks(q, indices) if k.shape[1] else ():
        keys, rows = _fetched(k, indices[:, t])
        nothing = indices[:, t] < 0  # what it fetched, and the query of a row that sees nothing, may be NaN
        keys = keys.masked_fill_(nothing[..., None], 0.0)
        grad = g[:, t].to(keys.dtype).masked_fill(nothing, 0.0)
        q_BTJD = _wide(q[:, t])
        z = torch.einsum("btjd,btnd->btjn", q_BTJD, keys).masked_fill_(nothing[:, :, None], 0.0)
        d_w[:, t] = torch.einsum("btn,btjn->btj", grad, z.relu()).to(d_w.dtype)
        d_z = torch.where(z > 0, grad[:, :, None] * _wide(weights[:, t])[..., None], 0.0)
        d_q[:, t] = torch.einsum("btjn,btnd->btjd", d_z, keys).to(d_q.dtype)
        d_rows = torch.einsum("btjn,btjd->btnd", d_z, q_BTJD).masked_fill_(nothing[..., None], 0.0).flatten(0, 2)
        if d_k.device.type == "cpu":
            d_k.index_add_(0, rows, d_rows)
        else:
            # Sorted, where index_add_ is not; and a key that many queries selected is summed by many threads.
            d_k += torch.ops.aten.embedding_dense_backward(d_rows, rows, len(d_k), -1, False)
    return d_q, d_k.view(k.shape).to(k.dtype), d_w


def allocate_topk(q, k, weights, start, end, topk, *_):
    shape = (q.shape[0], q.shape[1], topk)
    return start.new_empty(shape, dtype=torch.int64), start.new_empty(shape, dtype=torch.float32)


def allocate_scores(q, k, weights, indices):
    return q.new_empty(indices.shape, dtype=torch.promote_types(q.dtype, torch.float32))


def allocate_backward(g, q, k, weights, indices):
    return tuple(x.new_empty(x.shape) for x in (q, k, weights))
