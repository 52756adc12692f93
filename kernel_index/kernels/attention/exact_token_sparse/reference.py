"""The specification: dense attention under (selected) ∧ (allowed by the mask), in at least float32."""

import torch
from torch import Tensor

from kernel_index.core.excluded import guarded
from kernel_index.kernels.attention.exact_token_sparse.contract import ExactTokenCall
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.routing.membership import membership

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores."""


@guarded
def exact_token_reference(call: ExactTokenCall) -> tuple[Tensor, Tensor]:
    """An index that is out of range or not valid selects nothing."""
    q, k, v, indices, valid, mask, scale, softcap, sink = call[:9]
    assert indices is not None
    batch, queries, heads = q.shape[:3]
    keys, kv_heads = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BKGTD = (q.to(dtype) * scale_of(q, scale)).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.to(dtype).transpose(1, 2) for x in (k, v))
    sink_KG = None if sink is None else sink.to(dtype).view(kv_heads, heads // kv_heads, 1)
    start, end = mask.row_intervals(sizes_of(q, k, mask))
    key = torch.arange(keys, device=q.device)

    def attend(chunk: slice) -> tuple[Tensor, Tensor]:
        allowed = (key >= start[:, None, chunk, None]) & (key < end[:, None, chunk, None])
        member = membership(indices[:, chunk], None if valid is None else valid[:, chunk], keys).transpose(1, 2)
        return _attend(q_BKGTD[:, :, :, chunk], k_BKSD, v_BKSD, member & allowed, softcap, sink_KG)

    if torch.compiler.is_compiling() or batch * heads * queries * keys <= SCORES_AT_ONCE:
        out, lse = attend(slice(None))
    else:
        step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
        parts = [attend(slice(t, t + step)) for t in range(0, queries, step)]
        out, lse = (torch.cat(x, dim=3) for x in zip(*parts, strict=True))
    out_BTHD = out.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out_BTHD.to(q.dtype).contiguous(), lse.flatten(1, 2).contiguous()


def _attend(
    q_BKGTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, allowed_BPTS: Tensor, softcap: float, sink_KG: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores, allowed = torch.einsum("bkgtd,bksd->bkgts", q_BKGTD, k_BKSD), allowed_BPTS[:, :, None]
    if softcap:
        scores = softcap * torch.tanh(scores.masked_fill(~allowed, 0.0) / softcap)  # what is excluded may overflow
    empty = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sink_KG is not None:  # one more logit, without a value
        scores = torch.cat([scores, sink_KG[..., None].expand(*scores.shape[:-1], 1)], -1)
    scores = scores.masked_fill(empty, 0.0)  # softmax of a row of −∞ would be NaN, and so its gradient
    # The weights are 0 already where a key is not allowed; this keeps d_out·v from there, which may overflow.
    weights = torch.where(allowed, torch.softmax(scores, -1)[..., : k_BKSD.shape[2]], 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty[..., 0], -torch.inf)
    out = torch.einsum("bkgts,bksd->bkgtd", weights, v_BKSD)
    return out.masked_fill(empty, 0.0), lse  # it is 0 already; this keeps a NaN from above from the values
