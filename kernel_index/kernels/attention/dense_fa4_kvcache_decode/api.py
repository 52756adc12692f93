"""One step of decoding: append keys and values to a cache, then attend over all that it holds."""

from typing import Literal

from torch import Tensor

from kernel_index.core import device_documents, native
from kernel_index.core.dispatch import Backend, choose
from kernel_index.core.document_attention import ATTENTION
from kernel_index.kernels.attention.dense_fa4_kvcache_decode import contract, torch_op_repeated
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.native import SOURCE, decode_native
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.reference import decode_reference
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.sdpa import decode_sdpa
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.torch_op import decode_triton
from kernel_index.kvcache.decode_arguments import cast_result

DecodeBackend = Literal["auto", "fa4", "triton", "native", "sdpa", "reference"]


def _run_fa4(call: contract.DecodeCall) -> Tensor:
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode.fa4 import decode_fa4

    return decode_fa4(call)


BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        decode_triton,
        contract.triton_not_worth,
        invariant=device_documents.ATTENTION,
    ),
    Backend("fa4", contract.fa4_why_not, _run_fa4, details=contract.fa4_details),
    Backend(
        "native",
        contract.native_why_not,
        decode_native,
        native.once_built(SOURCE, not_worth=contract.native_not_worth),
        invariant=ATTENTION,
    ),
    Backend("sdpa", contract.sdpa_why_not, decode_sdpa),
    Backend("reference", contract.reference_why_not, decode_reference),
)


def fa4_kvcache_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    backend: DecodeBackend = "auto",
) -> Tensor:
    """Append k and v to the cache, then attend with q over all keys and values that it holds.

    With ``n = cache_seqlens[b]`` cached tokens and Ln new ones, row b becomes ``keys = cache[b, : n + Ln]`` and::

        cache[b, n : n + Ln] = k[b], v[b]                       through block_table where the cache is paged
        p       = n + Ln - Lq + t                               the last query is at the last key
        z[t, s] = scale · q[t, h]·keys[s, h // G]               softcap · tanh(z / softcap) with a softcap
        out[t]  = softmax(z[t]) · values                        over p - left ≤ s ≤ p (≤ p + right, not causal)

    A sink adds ``exp(sink[h])`` to the denominator.  A query without a key gives 0.  Position i of a paged row is
    ``k_cache[block_table[b, i // page], i % page]``.
    Lengths are not advanced here, since every layer of a model uses the same: ``ContiguousKVCache.advance`` and
    ``PagedKVCache.advance`` do it once per step.  Nothing waits for a device.  Nothing is written before the whole call
    has been checked: lengths and pages on the host here, those on a device by the caches' own ``begin``.

    Args:
        q: [B, Lq, H, D], any floating dtype.  Under autocast q, k and v are cast to the cache's dtype, and the
            result to autocast's.
        k_cache: [B, Tmax, K, D], or pages [pages, page, K, D]; q's dtype, H a multiple of K.  Written in place.
        v_cache: as k_cache.
        cache_seqlens: tokens in the cache before this call, int [B], or one number for every row.
        k: new keys [B, Ln, K, D], or None (with v) to attend without appending.
        v: new values, as k.
        causal: no query attends to a later position.
        window_size: ``(left, right)`` tokens around a query; None or negative is unlimited.
        softcap: bound of the scores; 0 is off.
        block_table: int32 [B, max_pages], the pages of each row in order; entries after its last token are not read.
        scale: factor of the scores; ``D ** -0.5`` by default.
        sink: [H], learnable sink logits: terms of the denominator without a value; None for no such term.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [B, Lq, H, D], contiguous, q's dtype.  Differentiable in q, k, v and sink; earlier cache content is a constant.

    Raises:
        TypeError: a tensor is not floating (or integer, for lengths and table), or dtypes differ.
        ValueError: shapes, heads or devices do not fit, the cache is full, a page id is out of range, or a page that is
            written belongs to two rows.
        Ineligible: the block table is of the wrong rank or batch, or the named backend cannot run this call.

    Source: FlashAttention's kvcache convention (Dao, 2023); paged caches: Kwon et al., 2023.

    >>> import torch, kernel_index as ki
    >>> cache = torch.zeros(2, 1, 4, 1, 2)
    >>> cache[1, 0, 0] = 1.0                          # one cached value, with a key of zeros
    >>> new = torch.full((1, 1, 1, 2), 3.0)
    >>> ki.fa4_kvcache_decode(0 * new, *cache, cache_seqlens=1, k=0 * new, v=new)
    tensor([[[[2., 2.]]]])
    >>> cache[1, 0, :, 0, 0]
    tensor([1., 3., 0., 0.])
    """
    tensors = q, k_cache, v_cache, cache_seqlens, block_table, k, v, sink
    key = torch_op_repeated.key_of(tensors, window_size, causal, softcap, scale, backend)
    if key is not None and (out := torch_op_repeated.run(key, tensors)) is not None:
        return out
    call = contract.check(
        q, k_cache, v_cache, cache_seqlens, k, v, causal, window_size, softcap, block_table, scale, sink
    )
    choice = choose("fa4_kvcache_decode", BACKENDS, backend, call)
    out = choice.run(call)
    if key is not None and choice.backend.name == "triton":
        torch_op_repeated.remember(key, call)
    return cast_result(out)
