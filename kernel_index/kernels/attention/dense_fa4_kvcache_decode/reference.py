"""The specification: append, then softmax attention over all tokens of the cache, in at least float32."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.excluded import Sight, guarded, sight_of_intervals
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall, key_intervals
from kernel_index.kvcache.slots import append, gathered, next_tokens, slots

SCORES_AT_ONCE = 1 << 26
"""Queries are taken in chunks of at most this many scores: 256 MiB of float32."""


class _Gathered(NamedTuple):
    """Queries, and the tokens of each row up to the cache's capacity; query t sees ``start ≤ s < end``."""

    q: Tensor  # [B, Lq, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor
    start: Tensor  # int64 [B, Lq]
    end: Tensor
    scale: float
    softcap: float
    sink: Tensor | None

    @property
    def excludes(self) -> bool:
        return True

    def sight(self) -> Sight:
        return sight_of_intervals(self.start, self.end)


def decode_reference(call: DecodeCall) -> Tensor:
    q, lengths, table = call.q, call.cache_seqlens, call.block_table
    append(call.k_cache, call.v_cache, lengths, call.k, call.v, table)
    keys, values = gathered(call.k_cache, table), gathered(call.v_cache, table)
    if call.k is not None and call.v is not None and rules.wants_gradient(call.k, call.v):
        new = slots(None, next_tokens(lengths, call.new_tokens), keys.shape[1])
        keys, values = keys.index_put(new, call.k), values.index_put(new, call.v)  # the same values, with a graph
    total = lengths.to(torch.int64) + call.new_tokens
    start, end = key_intervals(total, q.shape[1], call.window_bounds)
    return _attend(_Gathered(q, keys, values, start, end, call.scale, call.softcap, call.sink))


@guarded  # slots that hold no token may be NaN
def _attend(call: _Gathered) -> Tensor:
    q, keys, values, start, end, scale, softcap, sink = call
    (batch, queries, heads, _), kv_heads = q.shape, keys.shape[2]
    key = torch.arange(keys.shape[1], device=q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    k_BKSD, v_BKSD = (x.to(dtype).transpose(1, 2) for x in (keys, values))
    sink_KG = None if sink is None else sink.to(dtype).view(kv_heads, heads // kv_heads, 1, 1)
    q_BKGTD = (q.to(dtype) * scale).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)

    def attend(chunk: slice) -> Tensor:
        allowed = ((key >= start[:, chunk, None]) & (key < end[:, chunk, None]))[:, None, None]
        scores = torch.einsum("bkgtd,bksd->bkgts", q_BKGTD[:, :, :, chunk], k_BKSD)
        if softcap:
            scores = softcap * torch.tanh(scores.masked_fill(~allowed, 0.0) / softcap)  # may overflow there
        empty = ~allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
        if sink_KG is not None:  # one more logit, without a value
            scores = torch.cat([scores, sink_KG.expand(*scores.shape[:-1], 1)], -1)
        weights = torch.where(allowed, torch.softmax(scores, -1)[..., : keys.shape[1]], 0.0)
        return torch.einsum("bkgts,bksd->bkgtd", weights, v_BKSD).masked_fill(empty, 0.0)

    chunk = queries
    if not torch.compiler.is_compiling() and batch * heads * queries * key.numel() > SCORES_AT_ONCE:
        chunk = max(1, SCORES_AT_ONCE // (batch * heads * key.numel()))
    outs = [attend(slice(t, t + chunk)) for t in range(0, queries, chunk)] if queries else [attend(slice(None))]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype).contiguous()
