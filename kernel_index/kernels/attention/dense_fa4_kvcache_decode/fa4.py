"""Decoding by flash-attn-4: it reads pages through the table where the package can, else the gathered prefix."""

import importlib

import torch
from torch import Tensor

from kernel_index.core.fa4_support import support_of
from kernel_index.core.target import target_of
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall, pages_directly
from kernel_index.kvcache.slots import append, gathered


def decode_fa4(call: DecodeCall) -> Tensor:
    attend = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

    q, k_cache, v_cache, table = call.q, call.k_cache, call.v_cache, call.block_table
    append(k_cache, v_cache, call.cache_seqlens, call.k, call.v, table)
    pages = None
    if table is not None and pages_directly(support_of(target_of(q.device).arch), q.shape[-1]):
        pages = table.to(torch.int32).contiguous()
    elif table is not None:
        k_cache, v_cache = gathered(k_cache, table), gathered(v_cache, table)
    # The window stays None: with causal, (-1, 0) would select the package's local kernel with no left end at all.
    out, _ = attend(
        q.contiguous(),
        k_cache,
        v_cache,
        seqused_k=(call.cache_seqlens + call.new_tokens).to(torch.int32),
        page_table=pages,
        causal=call.causal,
        softmax_scale=call.scale,
        softcap=call.softcap,
        learnable_sink=call.sink,
    )
    return out
