"""Decoding by PyTorch's own kernel: the selected rows of keys and values through one paired gather, then attention.

Each query, or each KV head of a query where heads select for themselves, is a batch row with keys of its own.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_index.kernels.sparse.row_gather.api import gather_rows_pair
from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall
from kernel_index.kernels.sparse.selected_decode.selection import distinct, write_new_tokens
from kernel_index.kvcache.selected import KeyIntervals, SelectedTokens, key_intervals, selected_tokens

QUERIES_AT_ONCE = 64
"""Queries whose selected tokens are gathered together."""


def selected_decode_sdpa(call: SelectedDecodeCall) -> Tensor:
    q, cache = call.q, call.cache
    write_new_tokens(call)
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    if call.indices.shape[3] == 0 or call.blocks == 0:
        return out.zero_()
    intervals = key_intervals(cache, q.shape[1], call.window[0])
    blocks = distinct(call.indices, call.blocks)
    chunk = max(1, QUERIES_AT_ONCE // q.shape[0])
    for t in range(0, q.shape[1], chunk):
        part = slice(t, t + chunk)
        inside = KeyIntervals(*(x[:, part] for x in intervals))
        tokens = selected_tokens(blocks[:, part], call.block_size, inside, cache)
        out[:, part] = _attend(call, q[:, part], tokens)
    return out


def _attend(call: SelectedDecodeCall, q_BTHD: Tensor, tokens: SelectedTokens) -> Tensor:
    pools = [call.cache[name].flatten(0, 1) for name in ("k_cache", "v_cache")]  # [slots, K, D]
    index_BTGM, (kv_heads, width) = tokens.index, pools[0].shape[1:]
    groups, keys = index_BTGM.shape[2:]
    if groups > 1:  # a row of the gather is then one head of a token
        pools = [pool.view(-1, 1, width) for pool in pools]
        index_BTGM = index_BTGM * kv_heads + torch.arange(kv_heads, device=index_BTGM.device)[:, None]
    found = gather_rows_pair(*pools, index_BTGM.flatten())
    k_NKMD, v_NKMD = (x.view(-1, keys, *x.shape[1:]).transpose(1, 2) for x in found)
    allowed_NM = tokens.allowed.flatten(0, 2)
    empty_N = ~allowed_NM.any(1)  # PyTorch's kernels disagree about a row that sees nothing: open it, and set it to 0
    mask = (allowed_NM | empty_N[:, None])[:, None, None]
    q_NKJD = q_BTHD.reshape(k_NKMD.shape[0], k_NKMD.shape[1], -1, width)  # the J query heads of a KV head
    out = scaled_dot_product_attention(q_NKJD, k_NKMD, v_NKMD, attn_mask=mask, scale=call.scale)
    return out.masked_fill(empty_N[:, None, None, None], 0.0).reshape(q_BTHD.shape)
