"""Decoding by flash-attn-4: pages through the table where the package reads them, else the gathered prefix."""

import importlib

import torch
from torch import Tensor

from kernel_index.core.fa4_support import support_of
from kernel_index.core.target import target_of
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import pages_directly
from kernel_index.kvcache.slots import append, gathered
from kernel_index.masks.doc_window_mask.contract import Window


def decode_fa4(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool,
    window: Window,
    softcap: float,
    table: Tensor | None,
) -> Tensor:
    attend = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

    append(k_cache, v_cache, lengths, k, v, table)
    new = 0 if k is None else k.shape[1]
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
        seqused_k=(lengths + new).to(torch.int32),
        page_table=pages,
        causal=causal,
        softcap=softcap,
    )
    return out
