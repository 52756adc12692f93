"""Decoding on the CPU: the selected keys of a KV head are copied into memory that stays in the processor's cache.

A prompt's many queries go to the block-sparse core instead, row by row, which copies nothing for each query.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaDecodeCall
from kernel_index.kernels.sparse.moba_block_sparse.decoding import PROMPT, attend_prompt, route
from kernel_index.kvcache.selected import SelectedTokens, attend_gathered, selected_tokens

ELEMENTS_AT_ONCE = 1 << 18
"""Of keys, and of values, that are copied at a time: 1 MiB of float32."""


def decode_cpu(call: MobaDecodeCall) -> Tensor:
    routed = route(call)
    if call.q.shape[1] > PROMPT:
        return attend_prompt(call, routed.selected)
    out = call.q.new_empty(call.q.shape)
    if out.numel():
        blocks, left = routed.selected.indices, call.window[0]
        _fill(out, call, selected_tokens(blocks, call.block_size, routed.position, left, call.cache))
    return out


def _fill(out: Tensor, call: MobaDecodeCall, tokens: SelectedTokens) -> None:
    q, cache, groups = call.q, call.cache, call.groups
    (batch, queries, heads, width), kv_heads = q.shape, cache["k_cache"].shape[2]
    flat_k, flat_v = (cache[name].view(-1, width) for name in ("k_cache", "v_cache"))
    # [B, K, Lq · G/K, …]: all selections of one KV head together.
    index, allowed = (x.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3) for x in tokens)
    index = index * kv_heads + torch.arange(kv_heads, device=index.device)[:, None, None]
    shape = (kv_heads, groups // kv_heads, heads // groups)
    q_BKXHD = q.unflatten(2, shape).transpose(1, 2).flatten(2, 3)
    out_BKTGHD = out.view(batch, queries, *shape, width).transpose(1, 2)
    selections, keys = index.shape[2:]
    sinks = call.sink
    if sinks is not None:
        sinks = sinks.view(shape).repeat(1, queries, 1)[..., None]  # [K, Lq · G/K, H', 1]
    step = max(1, ELEMENTS_AT_ONCE // (keys * width))
    scratch = cache.scratch(2 * min(step, selections) * keys * width).view(2, -1, width)
    for b in range(batch):
        for h in range(kv_heads):
            outs = []
            for x in range(0, selections, step):
                rows = index[b, h, x : x + step].flatten()
                k_MD, v_MD = (
                    torch.index_select(source, 0, rows, out=into[: rows.shape[0]])
                    for source, into in zip((flat_k, flat_v), scratch, strict=True)
                )
                own = None if sinks is None else sinks[h, x : x + step]
                seen = allowed[b, h, x : x + step, None]
                outs.append(_attend(call, q_BKXHD[b, h, x : x + step], k_MD, v_MD, seen, own))
            joined = outs[0] if len(outs) == 1 else torch.cat(outs)
            out_BKTGHD[b, h] = joined.view(out_BKTGHD.shape[2:])


def _attend(
    call: MobaDecodeCall, q: Tensor, k_MD: Tensor, v_MD: Tensor, allowed: Tensor, sink: Tensor | None
) -> Tensor:
    """q [X, H', D], the keys of all X one after the other, allowed [X, 1, m], sink [X, H', 1]."""
    keys, values = (x.view(q.shape[0], -1, q.shape[-1]) for x in (k_MD, v_MD))
    if call.softcap or sink is not None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        sink, scaled = None if sink is None else sink.to(dtype), q.to(dtype) * call.scale
        return attend_gathered(scaled, keys.to(dtype), values.to(dtype), allowed, call.softcap, sink)
    return scaled_dot_product_attention(
        q[:, None], keys[:, None], values[:, None], attn_mask=allowed[:, None], scale=call.scale
    )
