"""The specification: dense attention under (selected) ∧ (allowed by the mask), in at least float32."""

import torch
from torch import Tensor

from kernel_index.kernels.attention.exact_token_sparse.contract import ExactTokenCall
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.lightning_indexer.selection import TokenSelection, replayed

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores."""


def exact_token_reference(call: ExactTokenCall) -> Tensor:
    """An index that is out of range or not valid selects nothing."""
    q, k, v, indices, valid, mask, scale, softcap = call[:8]
    assert indices is not None
    batch, queries, heads = q.shape[:3]
    keys, kv_heads = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BKGTD = (q.to(dtype) * scale_of(q, scale)).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.to(dtype).transpose(1, 2) for x in (k, v))
    start, end = mask.row_intervals(sizes_of(q, k, mask))
    key = torch.arange(keys, device=q.device)

    def attend(chunk: slice) -> Tensor:
        allowed = (key >= start[:, None, chunk, None]) & (key < end[:, None, chunk, None])
        member = _selected(indices[:, chunk], None if valid is None else valid[:, chunk], keys)
        return _attend(q_BKGTD[:, :, :, chunk], k_BKSD, v_BKSD, member & allowed, softcap)

    if torch.compiler.is_compiling() or batch * heads * queries * keys <= SCORES_AT_ONCE:
        out = attend(slice(None))
    else:
        step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
        out = torch.cat([attend(slice(t, t + step)) for t in range(0, queries, step)], dim=3)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype).contiguous()


def _selected(indices_BTPn: Tensor, valid_BTPn: Tensor | None, keys: int) -> Tensor:
    """Membership, bool [B, P, T, S]: a token that is selected twice is a member once."""
    is_selected = (indices_BTPn >= 0) & (indices_BTPn < keys)
    if valid_BTPn is not None:
        is_selected = is_selected & valid_BTPn
    column = torch.where(is_selected, indices_BTPn.long(), keys)  # one column more, for entries that select nothing
    member = torch.zeros(*column.shape[:3], keys + 1, dtype=torch.bool, device=column.device)
    return member.scatter(3, column, True)[..., :keys].transpose(1, 2)


def _attend(q_BKGTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, allowed_BPTS: Tensor, softcap: float) -> Tensor:
    scores = torch.einsum("bkgtd,bksd->bkgts", q_BKGTD, k_BKSD)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = allowed_BPTS[:, :, None]
    empty = ~allowed.any(-1, keepdim=True)
    # softmax of a row of −∞ would be NaN, and so its gradient
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v_BKSD)


def lightning_indexer_reference(
    q: Tensor, k: Tensor, weights: Tensor, topk: int, mask: MaskContract, replay: TokenSelection | None
) -> TokenSelection:
    """Every score, then a stable sort: what the streamed form must agree with."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, weights = (x.to(dtype) for x in (q, k, weights))
    start, end = mask.row_intervals(mask.sizes(batch, queries, keys, q.device))
    key = torch.arange(keys, device=q.device)

    def select(at: slice) -> tuple[Tensor, Tensor]:
        z = torch.einsum("btjd,bsd->btjs", q[:, at], k).relu()
        scores = torch.einsum("btjs,btj->bts", z, weights[:, at])
        if replay is not None:
            indices = replayed(TokenSelection(*(x[:, at] for x in replay)), start[:, at], end[:, at])
        else:
            allowed = (key >= start[:, at, None]) & (key < end[:, at, None])
            indices = _best(scores.detach(), allowed.expand_as(scores), topk)
        return indices, scores.gather(2, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)

    if keys == 0:
        scores = q.new_full((batch, queries, topk), -torch.inf)
        return TokenSelection(torch.full_like(scores, -1, dtype=torch.int64), scores > 0, scores)
    if torch.compiler.is_compiling() or batch * queries * heads * keys <= SCORES_AT_ONCE:
        indices, scores = select(slice(None))
    else:
        step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
        parts = [select(slice(t, t + step)) for t in range(0, queries, step)]
        indices, scores = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return TokenSelection(indices, indices >= 0, scores)


def _best(scores: Tensor, allowed: Tensor, topk: int) -> Tensor:
    """The allowed places by descending score, among equal ones by ascending place; −1 behind them."""
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    allowed_first = allowed.gather(-1, by_score).to(torch.int8).sort(dim=-1, descending=True, stable=True)
    places = torch.where(allowed_first.values > 0, by_score.gather(-1, allowed_first.indices), -1)
    return torch.nn.functional.pad(places[..., :topk], (0, max(0, topk - places.shape[-1])), value=-1)
