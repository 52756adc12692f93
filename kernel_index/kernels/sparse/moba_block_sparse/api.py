"""Mixture of block attention: each query attends to its current block and to the few blocks that its router selects."""

import functools
import math
from typing import Literal

from torch import Tensor

from kernel_index.core import native
from kernel_index.core.dispatch import Backend, choose
from kernel_index.kernels.sparse.block_sparse_attention.api import BACKENDS as CORE_BACKENDS
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseOutput
from kernel_index.kernels.sparse.moba_block_sparse import contract
from kernel_index.kernels.sparse.moba_block_sparse.attend import attend
from kernel_index.kernels.sparse.moba_block_sparse.backend_aliases import pick, resolve_block_sparse_backend
from kernel_index.kernels.sparse.moba_block_sparse.cpu import decode_cpu
from kernel_index.kernels.sparse.moba_block_sparse.decoding import decode_triton
from kernel_index.kernels.sparse.moba_block_sparse.flash import attend_flash
from kernel_index.kernels.sparse.moba_block_sparse.native import SOURCE, decode_native
from kernel_index.kernels.sparse.moba_block_sparse.reference import decode_reference
from kernel_index.kvcache.cache import CacheLayer, KVCache
from kernel_index.kvcache.decode_arguments import cast_result, layer_of
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.paths import along_paths
from kernel_index.routing.block_router.api import BACKENDS as ROUTERS
from kernel_index.routing.block_router.api import RouterBackend
from kernel_index.routing.branches import route_along_paths
from kernel_index.routing.legal_blocks import TopBlocks

__all__ = ["moba_attention", "moba_attention_with_lse", "moba_decode", "moba_route", "resolve_block_sparse_backend"]


def _on_core(core: Backend) -> Backend:
    """MoBA's router and then a backend of the block-sparse core, under the core's own rules."""
    not_worth = None if core.not_worth is None else functools.partial(contract.core_why_not, core.not_worth)
    return Backend(
        core.name,
        functools.partial(contract.core_why_not, core.why_not),
        functools.partial(attend, core),
        not_worth,
        contract.details,
        core.invariant,
    )


MobaBackend = Literal["auto", "triton", "flash", "native", "cpu", "reference"]
RoutePer = Literal["query_head", "kv_group"]

FLASH = Backend("flash", contract.flash_why_not, attend_flash, details=contract.details)
BACKENDS = tuple(_on_core(core) for core in CORE_BACKENDS)

DECODE_BACKENDS = (
    Backend(
        "triton",
        contract.decode_triton_why_not,
        decode_triton,
        contract.decode_triton_not_worth,
        contract.decode_details,
    ),
    Backend(
        "native", contract.decode_native_why_not, decode_native, native.once_built(SOURCE), contract.decode_details
    ),
    Backend("cpu", contract.decode_cpu_why_not, decode_cpu, details=contract.decode_details),
    Backend("reference", contract.decode_reference_why_not, decode_reference, details=contract.decode_details),
)


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    mask: MaskContract = EVERYTHING_BEFORE,
    route_per: RoutePer = "query_head",
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    query_tile_size: int = 64,
    backend: MobaBackend | None = "auto",
) -> Tensor:
    """Attention of each query to its current block and to the past blocks whose mean keys score best.

    Block j holds the keys ``[j·block_size, (j + 1)·block_size)``.  For a query at position p, in block ``c = p //
    block_size``, and with G = H / K query heads for each KV head::

        score[j] = q[t, h] · mean(k[s, h // G] for s in block j)     j < c, with a key that the mask allows; float32
        selected = {c} ∪ the topk − 1 best j, the smallest index among equals
        out[t]   = softmax(scale · q·k over the keys of selected blocks that the mask allows) · v

    A sink is one more term ``exp(sink[h])`` of the softmax's denominator.

    So ``topk = 1`` is the current block alone, and ``topk ≥ blocks`` is ``ki.attention``.  Future blocks are never
    selected, and a change of a future token changes no selection.  Where documents meet inside a block, its mean is
    over the last one of them; a document that begins at a block has the selection that it has alone.  In a prefix tree
    blocks count along each path, and every branch runs, and writes a receipt, as a call of its own.  Under
    ``numerics("invariant")`` blocks count from the start of each document.  Routing is exact and has no gradient;
    attention is differentiable in q, k, v and sink.

    Receipts carry ``semantic_branch``, ``router_type``, ``requested_backend`` as written, ``requested_backend_source``,
    ``actual_backend``, ``runtime_mode``, ``fallback_reason``, ``blocks``, ``picks``, ``density``, and ``routed_by``,
    the backend of ``moba_route`` that ran.

    Args:
        q: [B, T, H, D], any floating dtype.  Under autocast q, k and v are cast as those of
            ``F.scaled_dot_product_attention``.
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        block_size: keys of a block; the last block may be shorter.
        topk: blocks for each query, the current one counted.
        mask: which keys each query may attend to, besides its selection; causal.  Routing obeys it, too.
        route_per: ``"query_head"``, or ``"kv_group"`` for one selection by the mean query of a KV head's query heads.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        sink: [H], learnable sink logits: terms of the denominator without a value; None for no such term.
        query_tile_size: queries that a backend treats together where it works by tiles.
        backend: a name that ``resolve_block_sparse_backend`` takes.  ``"flash"`` falls back to what ``"auto"`` takes,
            and the receipt says so; any other named backend runs or raises ``Ineligible``.  ``"reference"`` routes by
            the reference too; otherwise the router is chosen as by ``moba_route``.

    Returns:
        [B, T, H, Dv], contiguous, q's dtype.  A query that may attend to nothing gives exactly 0.

    Raises:
        TypeError: a tensor or the mask is of the wrong type, or dtypes differ.
        ValueError: shapes, heads or devices do not fit, a size is not positive, or the mask is not causal.
        Ineligible: the backend is unknown, or cannot run this call.

    Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025; sink: gpt-oss.

    >>> import torch, kernel_index as ki
    >>> k = torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]).view(1, 8, 1, 1)
    >>> v = torch.arange(8.0).view(1, 8, 1, 1)
    >>> ki.moba_attention(torch.ones(1, 8, 1, 1), k, v, block_size=2, topk=1)[0, :, 0, 0]
    tensor([0.0000, 0.5000, 2.0000, 2.5000, 4.0000, 4.5000, 6.0000, 6.5000])
    >>> ki.moba_route(torch.ones(1, 8, 1, 1), k, block_size=2, topk=2).indices[0, -1, 0]
    tensor([1, 3], dtype=torch.int32)
    """
    call = contract.check(q, k, v, block_size, topk, mask, route_per, scale, softcap, query_tile_size, sink)
    return _attend("moba_attention", call, backend)[0]


def moba_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    mask: MaskContract = EVERYTHING_BEFORE,
    route_per: RoutePer = "query_head",
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    query_tile_size: int = 64,
    backend: MobaBackend | None = "auto",
) -> BlockSparseOutput:
    """``moba_attention`` together with the logarithm of each query's denominator, natural logarithm, the sink included.

    Args:
        q: as in ``moba_attention``, and so are the others; ``"flash"`` returns no log-sum-exp and falls back.

    Returns:
        ``BlockSparseOutput(out [B, T, H, Dv], lse [B, H, T])``; both carry gradients.  A query that may attend to
        nothing gives 0 and −inf, also where there is a sink.

    Raises:
        TypeError, ValueError, Ineligible: as ``moba_attention``.

    Source: as ``moba_attention``.

    >>> import torch, kernel_index as ki
    >>> x = torch.zeros(1, 4, 1, 8)
    >>> ki.moba_attention_with_lse(x, x, x, block_size=2, topk=1, sink=torch.zeros(1)).lse.exp()
    tensor([[[2., 3., 2., 3.]]])
    """
    call = contract.check(
        q, k, v, block_size, topk, mask, route_per, scale, softcap, query_tile_size, sink, with_lse=True
    )
    return BlockSparseOutput(*_attend("moba_attention_with_lse", call, backend))


def _attend(op: str, call: contract.MobaCall, backend: str | None) -> tuple[Tensor, ...]:
    """``out``, and ``lse`` where the call asks for it."""
    if call.mask.is_tree:

        def attend_branch(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract) -> tuple[Tensor, ...]:
            return _attend(op, call._replace(q=q, k=k, v=v, mask=mask), backend)

        by_key, gaps = (call.k, call.v), (0.0, -math.inf)
        return along_paths(op, attend_branch, call.mask, call.routing.sizes, (call.q,), by_key, (1, 2), gaps)
    choice = pick(op, BACKENDS, FLASH, backend, call)
    router = choice.choose("moba_route", ROUTERS, call.routing)
    found = choice.with_details(routed_by=router.backend.name).run(call, router)
    return found if call.with_lse else found[:1]


def moba_route(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    mask: MaskContract = EVERYTHING_BEFORE,
    route_per: RoutePer = "query_head",
    backend: RouterBackend = "auto",
) -> TopBlocks:
    """The blocks that ``moba_attention`` selects: to record, to look at, or to attend to by other means.

    Args:
        q: [B, T, H, D], and the others as in ``moba_attention``.
        backend: ``"auto"`` or the name of a backend of the router; a named backend runs or raises ``Ineligible``.

    Returns:
        ``TopBlocks(indices, valid)``, int32 and bool [B, T, G, n] with ``n = min(topk, blocks)`` and G = H or K:
        ascending, −1 and False where a query has fewer blocks.  Nothing waits for a device.

    Raises:
        TypeError, ValueError: as ``moba_attention``.
        Ineligible: the named backend cannot run this call.

    Source: as ``moba_attention``.

    >>> import torch, kernel_index as ki
    >>> x = torch.randn(1, 6, 1, 4)
    >>> ki.moba_route(x, x, block_size=2, topk=1).indices.flatten()
    tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    """
    call = contract.check_route(q, k, block_size, topk, mask, route_per)
    if mask.is_tree:

        def route_branch(q: Tensor, k: Tensor, mask: MaskContract) -> TopBlocks:
            return moba_route(q, k, block_size=block_size, topk=topk, mask=mask, route_per=route_per, backend=backend)

        return route_along_paths("moba_route", route_branch, mask, call.sizes, call.q, call.k, call.selected)
    return choose("moba_route", ROUTERS, backend, call).run(call)


def moba_decode(
    q: Tensor,
    cache: KVCache | CacheLayer,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_size: int,
    topk: int,
    window_size: tuple[int | None, int | None] = (-1, -1),
    route_per: str = "query_head",
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    layer: int = 0,
    backend: MobaBackend | None = "auto",
) -> Tensor:
    """One step of decoding: append k and v to the cache, and attend to the blocks that the router selects.

    The result is that of ``moba_attention`` over all tokens of a row, for its last Lq queries.  A step reads the mean
    key of each complete block, which the cache averages once, in the step that completes it, and the keys and values
    of the selected blocks, never the whole cache.  Nothing waits for a device: KV-cache bookkeeping is on the host.
    A CUDA graph of one step serves every later one, until a row of a paged cache has over 256 pages and four times as
    many as the longest row had in the capture: its outputs are NaN from then on, and a new capture is due.

    Args:
        q: [B, Lq, H, D], any floating dtype.  Under autocast q, k and v are cast to the cache's dtype, and the
            result to autocast's.
        cache: a ``ContiguousKVCache`` or ``PagedKVCache`` with an open step, or what its ``layer`` returned.  Its
            lengths are advanced by ``cache.advance``, once per step.
        k: keys [B, Ln, K, D] of the step's new tokens; None for a step of none.
        v: values, as k.
        block_size: tokens of a block; any, whatever the pages.
        topk: blocks for each query, the current one counted.
        window_size: ``(left, right)`` tokens around a query; None or negative is unlimited.  Decoding is causal.
        route_per: ``"query_head"`` or ``"kv_group"``.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        sink: [H], learnable sink logits, one more term ``exp(sink[h])`` of the denominator; None for no such term.
        layer: which layer of a cache that is given whole.
        backend: as in ``moba_attention``.

    Returns:
        [B, Lq, H, D], contiguous, q's dtype.  Differentiable in q, k, v and sink; earlier cache content is a constant.

    Raises:
        TypeError: the cache is of another type, or a tensor is of the wrong type.
        ValueError: shapes, heads or devices do not fit, a size is not positive, or k is not of the step's tokens.
        Ineligible: the backend is unknown, or cannot run this call.

    Source: as ``moba_attention``; its authors' own decoding attends to everything.

    >>> import torch, kernel_index as ki
    >>> cache = ki.ContiguousKVCache(1, 1, 8, 1, 1)
    >>> k, v = torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0]).view(1, 5, 1, 1), torch.arange(5.0).view(1, 5, 1, 1)
    >>> cache.begin(5)
    >>> ki.moba_decode(torch.zeros(1, 1, 1, 1), cache, k=k, v=v, block_size=2, topk=2)  # a tie: blocks 0 and 2
    tensor([[[[1.6667]]]])
    """
    view = layer_of(cache, layer)
    call = contract.check_decode(q, view, k, v, block_size, topk, window_size, route_per, scale, softcap, sink)
    choice = pick("moba_decode", DECODE_BACKENDS, None, backend, call)
    if isinstance(cache, KVCache):
        cache.layer(layer)  # counts as this layer's call in the step, once nothing can refuse it any more
    return cast_result(choice.run(call))
