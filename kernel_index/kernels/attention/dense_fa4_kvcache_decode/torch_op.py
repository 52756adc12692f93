"""The registered op behind ``triton``: it only reads the cache, which was written before by a plain scatter."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import reach_of
from kernel_index.kvcache.slots import append
from kernel_index.masks.doc_window_mask.contract import Window


def _allocate(q, k_cache, v_cache, lengths, table, new, left, right, softcap):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _launch(q, k_cache, v_cache, lengths, table, new, left, right, softcap):
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    out = _allocate(q, k_cache, v_cache, lengths, table, new, left, right, softcap)
    q, k_cache, v_cache = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    return triton.decode(q, k_cache, v_cache, lengths.contiguous(), table, new, left, right, softcap, out)


_decode_op = ops.register(
    "kvcache_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? table, SymInt new, int left, "
    "int right, float softcap) -> Tensor",
    _launch,
    _allocate,
)


def decode_triton(
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
    append(k_cache, v_cache, lengths, k, v, table)
    left, right = (-1 if side is None else side for side in reach_of(causal, window))
    new = 0 if k is None else k.shape[1]
    return _decode_op(q, k_cache, v_cache, lengths, table, new, left, right, float(softcap))
