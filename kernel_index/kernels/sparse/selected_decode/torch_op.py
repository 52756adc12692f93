"""The registered op of ``triton``: it reads the cache, which was written before, and the selected blocks."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall
from kernel_index.kernels.sparse.selected_decode.selection import distinct, write_new_tokens
from kernel_index.kvcache.cache import CacheLayer
from kernel_index.kvcache.selected import Visible


def _allocate(q, k_cache, v_cache, selected, lengths, table, new, left, groups, block_size, scale, softcap, sink=None):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _launch(q, k_cache, v_cache, selected, lengths, table, new, left, groups, block_size, scale, softcap, sink=None):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, selected, seen = launch.dense_heads(q), selected.contiguous(), Visible(lengths, table, new, left)
    if out.numel() == 0 or selected.numel() == 0 or k_cache.numel() == 0:
        return out.zero_()
    count = selected.shape[3]
    chosen = launch_for(q, k_cache, seen, groups, count, block_size)
    with launch.on_device(q):
        return attend_into(out, q, k_cache, v_cache, selected, seen, chosen, count, scale, softcap, None, sink)


# Captured graphs hold this name, which is older than ``selected_decode``.
_decode_op = ops.register(
    "moba_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor picks, Tensor lengths, Tensor? table, int new, "
    "int left, int groups, int block_size, float scale, float softcap, Tensor? sink=None) -> Tensor",
    _launch,
    _allocate,
)


def attend_into(*args: Any, **more: Any) -> Tensor:
    """``triton.decode`` for launchers of other kernels that have routed."""
    from kernel_index.kernels.sparse.selected_decode import triton

    return triton.decode(*args, **more)


def launch_for(*args: Any) -> Any:
    """``triton.launch_for``, for a launcher that gives ``attend_into`` its memory."""
    from kernel_index.kernels.sparse.selected_decode import triton

    return triton.launch_for(*args)


def attend_blocks(
    q: Tensor,
    cache: CacheLayer,
    blocks: Tensor,
    groups: int,
    left: int | None,
    block_size: int,
    scale: float,
    softcap: float,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention over a written cache, for kernels that have routed.

    Each block of a query occurs once in ``blocks`` [B, Lq, G or 1, n], −1 for none; ``groups`` is G, a multiple of K
    that divides H.  A query attends to the tokens of its blocks that are not after it, and at most ``left`` before it.
    """
    args = (q, cache["k_cache"], cache["v_cache"], blocks, cache["cache_seqlens"], cache["block_table"])
    more = (cache.new_tokens, -1 if left is None else left, groups, block_size, float(scale), float(softcap), sink)
    return ops.run(_decode_op, _launch, *args, *more)


def selected_decode_triton(call: SelectedDecodeCall) -> Tensor:
    write_new_tokens(call)
    blocks, groups = distinct(call.indices), call.cache["k_cache"].shape[2]
    return attend_blocks(call.q, call.cache, blocks, groups, call.window[0], call.block_size, call.scale, call.softcap)
