"""Decoding by PyTorch's own kernel: the selected rows of keys and values through one paired gather, then attention.

Each query, or each KV head of a query where heads select for themselves, is a batch row with keys of its own.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_index.kernels.sparse.row_gather.api import gather_rows_pair
from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall
from kernel_index.kernels.sparse.selected_decode.selection import distinct, write_new_tokens
from kernel_index.kvcache.selected import query_positions, selected_tokens

QUERIES_AT_ONCE = 64
"""Queries whose selected tokens are gathered together."""


def selected_decode_sdpa(call: SelectedDecodeCall) -> Tensor:
    q = call.q
    write_new_tokens(call)
    if q.numel() == 0 or call.indices.shape[3] == 0 or call.blocks == 0:
        return q.new_zeros(q.shape)
    queries, chunk = q.shape[1], max(1, QUERIES_AT_ONCE // q.shape[0])
    position, blocks = query_positions(call.cache, queries), distinct(call.indices)
    if queries <= chunk:
        return _attend(call, q, blocks, position)
    chunks = (slice(t, t + chunk) for t in range(0, queries, chunk))
    return torch.cat([_attend(call, q[:, t], blocks[:, t], position[:, t]) for t in chunks], 1)


def _attend(call: SelectedDecodeCall, q_BTHD: Tensor, blocks_BTGn: Tensor, position_BT: Tensor) -> Tensor:
    index, allowed = selected_tokens(blocks_BTGn, call.block_size, position_BT, call.window[0], call.cache)
    k_SKD, v_SKD = (call.cache[name].flatten(0, 1) for name in ("k_cache", "v_cache"))
    (groups, keys), (kv_heads, width) = index.shape[2:], k_SKD.shape[1:]
    if groups > 1:  # a row of the gather is then one head of a token
        k_SKD, v_SKD = (x.view(-1, 1, width) for x in (k_SKD, v_SKD))
        index = index * kv_heads + torch.arange(kv_heads, device=index.device)[:, None]
    found = gather_rows_pair(k_SKD, v_SKD, index.flatten())
    k_NKMD, v_NKMD = (x.view(-1, keys, *x.shape[1:]).transpose(1, 2) for x in found)
    rows, heads = k_NKMD.shape[:2]
    empty = ~allowed.any(3, keepdim=True)  # PyTorch's kernels disagree about a row that sees nothing: open it, then 0
    mask = (allowed | empty).view(rows, 1, 1, keys)
    q_NKJD = q_BTHD.reshape(rows, heads, -1, width)  # the J query heads of a KV head
    out = scaled_dot_product_attention(q_NKJD, k_NKMD, v_NKMD, attn_mask=mask, scale=call.scale)
    out = out.masked_fill_(empty.view(rows, 1, 1, 1), 0.0)
    return out.reshape(q_BTHD.shape).to(q_BTHD.dtype).contiguous()
