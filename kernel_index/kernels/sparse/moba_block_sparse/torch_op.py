"""The registered op of ``triton`` for ``moba_decode``: writing the cache and routing come before it."""

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaDecodeCall
from kernel_index.kernels.sparse.moba_block_sparse.decoding import route


def _allocate(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _launch(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap):
    from kernel_index.kernels.sparse.moba_block_sparse import triton

    out = _allocate(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap)
    q, picks, start, position = launch.dense((q, picks, start, position))
    return triton.decode(q, k_cache, v_cache, picks, start, position, table, block_size, scale, softcap, out)


_decode_op = ops.register(
    "moba_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor picks, Tensor start, Tensor position, "
    "Tensor? table, int block_size, float scale, float softcap) -> Tensor",
    _launch,
    _allocate,
)


def decode_triton(call: MobaDecodeCall) -> Tensor:
    selected, start, position = route(call)
    caches, table = (call.cache["k_cache"], call.cache["v_cache"]), call.cache["block_table"]
    blocks = torch.where(selected.valid, selected.indices, -1)
    scale, softcap = float(call.scale), float(call.softcap)
    return _decode_op(call.q, *caches, blocks, start, position, table, call.block_size, scale, softcap)
