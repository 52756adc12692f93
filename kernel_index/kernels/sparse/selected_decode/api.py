"""One step of decoding over a selection that the caller made: tokens or blocks of a cache, chosen for each query."""

from typing import Literal

from torch import Tensor

from kernel_index.core import native
from kernel_index.core.dispatch import Backend, choose
from kernel_index.kernels.sparse.selected_decode import contract
from kernel_index.kernels.sparse.selected_decode.native import SOURCE, selected_decode_native
from kernel_index.kernels.sparse.selected_decode.reference import selected_decode_reference
from kernel_index.kernels.sparse.selected_decode.sdpa import selected_decode_sdpa
from kernel_index.kernels.sparse.selected_decode.torch_op import (
    attend_blocks,
    attend_into,
    launch_for,
    selected_decode_triton,
)
from kernel_index.kvcache.cache import CacheLayer, KVCache
from kernel_index.kvcache.decode_arguments import cast_result, layer_of

__all__ = ["attend_blocks", "attend_into", "launch_for", "selected_decode"]

SelectedDecodeBackend = Literal["auto", "triton", "native", "sdpa", "reference"]

BACKENDS = (
    Backend(
        "triton", contract.triton_why_not, selected_decode_triton, contract.triton_not_worth, details=contract.details
    ),
    Backend("native", contract.native_why_not, selected_decode_native, native.once_built(SOURCE), contract.details),
    Backend("sdpa", contract.sdpa_why_not, selected_decode_sdpa, details=contract.details),
    Backend("reference", contract.reference_why_not, selected_decode_reference, details=contract.details),
)


def selected_decode(
    q: Tensor,
    cache: KVCache | CacheLayer,
    indices: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_size: int = 1,
    window_size: tuple[int | None, int | None] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    layer: int = 0,
    backend: SelectedDecodeBackend = "auto",
) -> Tensor:
    """One step of decoding: append k and v to the cache, and attend to exactly the tokens that are selected.

    With ``S(t)`` the tokens ``[j·block_size, (j + 1)·block_size)`` of every selected block j of query t, p its position
    in its row, and G = H / K query heads for each KV head::

        z[t, s] = scale · q[t, h]·key[s, h // G]          softcap · tanh(z / softcap) with a softcap
        out[t]  = Σ_s softmax(z[t])[s] · value[s]         over s in S(t) with p − left ≤ s ≤ p

    ``block_size=1`` selects single tokens, as ``lightning_indexer`` does; ``hierarchical_block_select`` selects blocks.
    Of keys and values only the selected ones are read, through the page table where the cache is paged.  A block counts
    once however often it is selected, and a query without a token gives exactly 0.  Nothing waits for a device.

    Args:
        q: [B, Lq, H, D], any floating dtype; the last query is at a row's last token.  Under autocast q, k and v are
            cast to the cache's dtype, and the result to autocast's.
        cache: a ``ContiguousKVCache`` or ``PagedKVCache`` with an open step, or what its ``layer`` returned.  Its
            lengths are advanced by ``cache.advance``, once per step.
        indices: int32 or int64, blocks for all heads [B, Lq, n] or for each KV head [B, Lq, K, n], counted from the
            beginning of the row; −1 for none.
        k: keys [B, Ln, K, D] of the step's new tokens.  Where ``CacheLayer.write`` has stored them they are not written
            again, and may be None if they need no gradient.
        v: values, as k.
        block_size: tokens of a block; any, whatever the pages.
        window_size: ``(left, right)`` tokens around a query; None or negative is unlimited.  Decoding is causal.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        layer: which layer of a cache that is given whole.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [B, Lq, H, D], contiguous, q's dtype.  Differentiable in q, k and v; earlier cache content is a constant.

    Raises:
        TypeError: the cache is of another type, or a tensor is of the wrong type.
        ValueError: shapes, heads or devices do not fit, k is not of the step's tokens, or an index on the host is not
            that of a block.
        Ineligible: the named backend cannot run this call.

    Source: decoding of token-level selections, as in DeepSeek-V3.2 (2025).

    >>> import torch, kernel_index as ki
    >>> cache = ki.ContiguousKVCache(1, 1, 8, 1, 1)
    >>> v = torch.arange(5.0).view(1, 5, 1, 1)
    >>> cache.begin(5)
    >>> ki.selected_decode(torch.zeros(1, 1, 1, 1), cache, torch.tensor([[[0, 4, -1]]]), k=0 * v, v=v)
    tensor([[[[2.]]]])
    """
    call = contract.check(q, layer_of(cache, layer), indices, k, v, block_size, window_size, scale, softcap)
    choice = choose("selected_decode", BACKENDS, backend, call)
    if isinstance(cache, KVCache):
        cache.layer(layer)  # counts as this layer's call in the step, once nothing can refuse it any more
    return cast_result(choice.run(call))
