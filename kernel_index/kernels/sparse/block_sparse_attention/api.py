"""Attention of each query to the key blocks that were selected for it: the core of the routed kernels."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core import device_documents, native
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.document_attention import ATTENTION
from kernel_index.kernels.sparse.block_sparse_attention import contract
from kernel_index.kernels.sparse.block_sparse_attention.contract import BlockSparseCall
from kernel_index.kernels.sparse.block_sparse_attention.cpu import block_sparse_cpu
from kernel_index.kernels.sparse.block_sparse_attention.native import SOURCE, block_sparse_native
from kernel_index.kernels.sparse.block_sparse_attention.reference import block_sparse_reference
from kernel_index.kernels.sparse.block_sparse_attention.torch_op import block_sparse_triton
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps

BlockSparseBackend = Literal["auto", "triton", "native", "cpu", "reference"]

BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        block_sparse_triton,
        contract.triton_not_worth,
        invariant=device_documents.ATTENTION,
    ),
    Backend(
        "native",
        contract.native_why_not,
        block_sparse_native,
        native.once_built(SOURCE, not_worth=contract.cpu_not_worth),
        invariant=ATTENTION,
    ),
    Backend("cpu", contract.cpu_why_not, block_sparse_cpu, contract.cpu_not_worth),
    Backend("reference", always, block_sparse_reference),
)


class BlockSparseOutput(NamedTuple):
    """``out`` [B, T, H, Dv] in q's dtype; ``lse`` [B, H, T], natural logarithm, float32 (float64 for float64).

    >>> import torch
    >>> from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
    >>> x, selected = torch.zeros(1, 4, 1, 8), torch.tensor([0, 0, 1, 0]).view(1, 4, 1, 1)
    >>> block_sparse_attention(x, x, x, selected, block_size=2).lse.exp()
    tensor([[[1., 2., 1., 2.]]])
    """

    out: Tensor
    lse: Tensor


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    *,
    selected_valid: Tensor | None = None,
    block_size: int,
    mask: MaskContract = EVERYTHING_BEFORE,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    query_tile_size: int = 64,
    maps: UnionMaps | None = None,
    backend: BlockSparseBackend = "auto",
) -> BlockSparseOutput:
    """Softmax attention of each query to the keys of its selected blocks that the mask also allows.

    Key s belongs to block ``s // block_size``.  With ``z = scale · q[t, h]·k[s, h // (H / K)]``, capped by
    ``softcap · tanh(z / softcap)`` where a softcap is given, and head h in group ``g = h // (H / G)``::

        allowed(t, g, s) = s // block_size ∈ selected[t, g]  and  the mask allows s for t
        out[t, h] = Σ_s exp(z[t, s]) · v[s] / (exp(sink[h]) + Σ_s exp(z[t, s]))
        lse[h, t] = log(exp(sink[h]) + Σ_s exp(z[t, s]))

    over the allowed s, without exp(sink) where no sink is given.  A block that is selected twice counts once.  A query
    with nothing allowed gives exactly 0, a log-sum-exp of −inf, also where there is a sink, and no gradient to
    anything.  Under ``numerics("invariant")`` blocks count from the start of each document: key s of one that begins at
    o belongs to block ``(s − o) // block_size``.

    Args:
        q: [B, T, H, D], any floating dtype.  Under autocast q, k and v are cast as those of
            ``F.scaled_dot_product_attention``.
        k: [B, S, K, D], q's dtype; nothing is repeated in memory for the query heads.
        v: [B, S, K, Dv], q's dtype.
        selected: integers [B, T, G, n], block indices in any order; negative for none.  K divides G and G divides H:
            G = K shares a selection among the query heads of a KV head, G = H has one for each query head.
        selected_valid: bool [B, T, G, n], False for none; None where the sign of ``selected`` says it all.
        block_size: keys of a block; the last block may be shorter.
        mask: the keys that each query may attend to at all.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        sink: [H], learnable sink logits: terms of the denominator without a value; None for no such term.
        query_tile_size: queries that a backend treats together where it works by tiles.
        maps: ``union_selection`` of the same selection and tile size, for backends that use it; computed if None.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``BlockSparseOutput(out [B, T, H, Dv], lse [B, H, T])``; both carry gradients to q, k, v and sink.

    Raises:
        TypeError: a tensor or the mask is of the wrong type, or dtypes differ.
        ValueError: shapes, heads, groups or devices do not fit, or a selected block on the host is beyond the last.
        Ineligible: the named backend cannot run this call.

    Source: Lu et al., "MoBA", 2025; Yuan et al., "Native Sparse Attention", 2025; sink: gpt-oss.

    >>> import torch
    >>> from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
    >>> q, k = torch.ones(1, 4, 1, 8), torch.ones(1, 4, 1, 8)
    >>> v = k * torch.arange(4.0).view(1, 4, 1, 1)
    >>> selected = torch.tensor([[0, -1], [0, -1], [0, 1], [1, -1]]).view(1, 4, 1, 2)
    >>> block_sparse_attention(q, k, v, selected, block_size=2).out[0, :, 0, 0]
    tensor([0.0000, 0.5000, 1.0000, 2.5000])
    """
    call = contract.check(
        BlockSparseCall(
            q, k, v, selected, selected_valid, block_size, mask, scale, softcap, query_tile_size, maps, sink
        )
    )
    return BlockSparseOutput(*choose("block_sparse_attention", BACKENDS, backend, call).run(call))
