"""The specification: dense attention under (the selected blocks, expanded to tokens) ∧ (the token mask)."""

import torch
from torch import Tensor

from kernel_index.core.excluded import guarded
from kernel_index.kernels.sparse.block_sparse_attention.contract import BlockSparseCall
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.routing.membership import membership

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores: 256 MiB of float32."""


@guarded
def block_sparse_reference(call: BlockSparseCall) -> tuple[Tensor, Tensor]:
    q, k, v, selected, softcap = call.q, call.k, call.v, call.selected, call.softcap
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    groups = selected.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    # [B, K, G/K, H/G, T, D] against [B, K, S, D]: the heads of a group share a selection, nothing is repeated.
    split = (kv_heads, groups // kv_heads, heads // groups)
    q_BKGHTD = (q.to(dtype) * scale_of(q, call.scale)).unflatten(2, split).permute(0, 2, 3, 4, 1, 5)
    k_BKSD, v_BKSD = (x.to(dtype).transpose(1, 2) for x in (k, v))
    start, end = call.mask.row_intervals(call.sizes)
    key = torch.arange(keys, device=q.device)
    member = membership(selected, call.selected_valid, call.blocks)
    sink_KGH = None if call.sink is None else call.sink.to(dtype).view(*split, 1)

    def attend(chunk: slice) -> tuple[Tensor, Tensor]:
        inside = (key >= start[:, chunk, None]) & (key < end[:, chunk, None])
        allowed_BTGS = member[:, chunk].index_select(-1, key // call.block_size) & inside[:, :, None]
        allowed = allowed_BTGS.unflatten(2, split[:2]).permute(0, 2, 3, 1, 4)[:, :, :, None]
        return _attend(q_BKGHTD[:, :, :, :, chunk], k_BKSD, v_BKSD, allowed, softcap, sink_KGH)

    if torch.compiler.is_compiling() or batch * heads * queries * keys <= SCORES_AT_ONCE:
        out, lse = attend(slice(None))
    else:
        step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
        parts = [attend(slice(t, t + step)) for t in range(0, queries, step)]
        out, lse = (torch.cat(x, dim=4) for x in zip(*parts, strict=True))
    out_BTHD = out.permute(0, 4, 1, 2, 3, 5).flatten(2, 4)
    return out_BTHD.to(q.dtype).contiguous(), lse.flatten(1, 3).contiguous()


def _attend(
    q_BKGHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, allowed: Tensor, softcap: float, sink_KGH: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bkghtd,bksd->bkghts", q_BKGHTD, k_BKSD)
    if softcap:
        scores = softcap * torch.tanh(scores.masked_fill(~allowed, 0.0) / softcap)  # what is excluded may overflow
    empty = ~allowed.any(-1)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sink_KGH is not None:  # one more logit, without a value
        scores = torch.cat([scores, sink_KGH[..., None].expand(*scores.shape[:-1], 1)], -1)
    scores = scores.masked_fill(empty[..., None], 0.0)  # softmax of a row of −inf would be NaN, and so its gradient
    # The weights are 0 already where a key is not allowed; this keeps d_out·v from there, which may overflow.
    weights = torch.where(allowed, torch.softmax(scores, -1)[..., : k_BKSD.shape[2]], 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty, -torch.inf)
    out = torch.einsum("bkghts,bksd->bkghtd", weights, v_BKSD)
    return out.masked_fill(empty[..., None], 0.0), lse  # it is 0 already; this keeps a NaN from above from the values
