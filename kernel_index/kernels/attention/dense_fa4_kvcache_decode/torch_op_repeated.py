"""A decoding step like an earlier one: launched at once, because the host is the limit of such a step.

Every layer of a model and every later step calls with tensors of the same sizes.  Checks, rules and launches read
nothing but the sizes and kinds of tensors on a GPU, and the numbers beside them.  Those are the key of a call: after
one has gone the long way, the next ones of the same key need nothing but their launches.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernel_index.core import settled
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.contract import DecodeCall

if TYPE_CHECKING:
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode.triton import Launches

OP = "fa4_kvcache_decode"
MOST_KNOWN = 4096
"""Keys that are remembered; then it begins anew."""


_KNOWN: "dict[Hashable, Launches]" = {}


def key_of(tensors: tuple[Any, ...], window_size: Any, *numbers: Any) -> Hashable | None:
    """The key of a call; None where it is none of plain tensors on a GPU, or where something else may decide it."""
    if not settled.goes_by_arguments(OP) or type(window_size) is not tuple:
        return None
    sizes, values = settled.sizes_of(tensors), settled.numbers_of((*numbers, *window_size))
    return None if sizes is None or values is None else (sizes, values)


def run(key: Hashable, tensors: tuple[Any, ...]) -> Tensor | None:
    """The output of a call with a known key, after its launches; None where the long way must be gone."""
    made = _KNOWN.get(key)
    if made is None:
        return None
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    q, k_cache, v_cache, lengths, table, k, v, sink = tensors
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    triton.launch(made, q, k_cache, v_cache, lengths, table, (k, v), sink, out)
    torch.autograd.graph.increment_version([k_cache, v_cache])  # as decode_triton has it
    return out


def remember(key: Hashable, call: DecodeCall) -> None:
    """Keep the key of a call that ``triton`` has run, where its launches read the caller's own tensors."""
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import torch_op, triton

    q, k, v, lengths, table = call.q, call.k, call.v, call.cache_seqlens, call.block_table
    if k is None or v is None or not torch_op.writes_itself(call):
        return
    dense = q.stride(-1) == k.stride(-1) == 1 and k.stride() == v.stride() and lengths.is_contiguous()
    if not dense or call.k_cache.shape[1] == 0 or (table is not None and (table.shape[1] == 0 or table.stride(1) != 1)):
        return
    if len(_KNOWN) >= MOST_KNOWN:
        _KNOWN.clear()
    window = torch_op.bounds_of(call)
    numbers = call.new_tokens, window, float(call.scale), float(call.softcap)
    _KNOWN[key] = triton.launches_of(q, call.k_cache, lengths, table, k, call.sink, *numbers)
