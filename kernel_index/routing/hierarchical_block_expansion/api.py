"""Selects key blocks in two steps: the best coarse groups first, then the best of their children."""

from typing import Literal

from torch import Tensor

from kernel_index.core import native
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.forced_blocks import ForcedBlock
from kernel_index.routing.hierarchical_block_expansion import contract
from kernel_index.routing.hierarchical_block_expansion.chunked import select_chunked
from kernel_index.routing.hierarchical_block_expansion.native import SOURCE, select_native
from kernel_index.routing.hierarchical_block_expansion.recall import with_recall
from kernel_index.routing.hierarchical_block_expansion.reference import select_reference
from kernel_index.routing.hierarchical_block_expansion.selection import BlockSelection
from kernel_index.routing.hierarchical_block_expansion.torch_op import select_triton

HierarchyBackend = Literal["auto", "triton", "native", "chunked", "reference"]

BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        with_recall(select_triton),
        contract.triton_not_worth,
        contract.details,
    ),
    Backend("native", contract.native_why_not, with_recall(select_native), native.once_built(SOURCE), contract.details),
    Backend("chunked", always, with_recall(select_chunked), details=contract.details),
    Backend("reference", always, with_recall(select_reference), details=contract.details),
)


def hierarchical_block_select(
    q: Tensor,
    block_keys: Tensor,
    *,
    coarse_ratio: int = 8,
    coarse_topc: int = 16,
    final_topk: int = 8,
    mask: MaskContract = EVERYTHING_BEFORE,
    block_size: int,
    forced: tuple[ForcedBlock, ...] = ("current",),
    kv_len: int | None = None,
    recall: bool = False,
    backend: HierarchyBackend = "auto",
) -> BlockSelection:
    """Select key blocks for every query: the best groups of blocks first, then the best blocks inside them.

    With ``q̄`` the mean query of a group of heads, and a query's legal blocks those that lie wholly before the block
    that holds it and have a key that the mask allows::

        meta[t, m] = q̄[t] · mean of block_keys[j] over the legal children j of group m,  j // coarse_ratio = m
        candidates = the legal children of the coarse_topc best groups
        selection  = the forced blocks, then the best candidates by q̄[t] · block_keys[j], final_topk in all

    Scores are float32; among equal ones the smallest index wins.  No token after a query has any influence on its
    selection.  With ``coarse_topc`` groups or fewer the selection is the exhaustive one exactly.  No gradient.

    Args:
        q: [B, T, H, D], any floating dtype.
        block_keys: [B, blocks, K, D], one key for each block, such as the mean of its keys; H is a multiple of K.
        coarse_ratio: children of a group.
        coarse_topc: groups that are expanded.
        final_topk: blocks for each query, the forced ones counted.
        mask: which keys each query may attend to; causal.
        block_size: tokens of a block.
        forced: blocks that are selected whatever their score, of ``"current"`` (it holds the query), ``"sink"`` (the
            first legal one) and ``"local"`` (the one before the current).  Without ``"current"`` only past blocks are
            selected.
        kv_len: S, the number of keys.  By default that of the mask's documents, else T where T tokens make that many
            blocks, else ``blocks · block_size``.
        recall: compare with the exhaustive selection, which costs that selection and waits for the device.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``BlockSelection(indices, valid, plan)``.  A query with fewer legal blocks has −1 in its last columns; one that
        may attend to nothing has −1 in all of them.

    Raises:
        TypeError: a tensor is not floating, or an option is of the wrong type.
        ValueError: shapes do not fit, an option is out of range, or the mask is not causal.
        Ineligible: the named backend cannot run this call.

    Source: two-level selection as in HISA (arXiv 2603.28458) and MSA (arXiv 2606.13392).

    >>> import torch, kernel_index as ki
    >>> block_keys = torch.tensor([3.0, 9.0, 0.0, 1.0, 2.0, 2.0, 0.0, 0.0]).view(1, 8, 1, 1)
    >>> query = torch.ones(1, 1, 1, 1)  # at position 15, in block 7
    >>> selected = ki.hierarchical_block_select(
    ...     query, block_keys, coarse_ratio=2, coarse_topc=2, final_topk=3, block_size=2
    ... )
    >>> selected.indices.tolist(), selected.plan.candidates
    ([[[[0, 1, 7]]]], 4)
    """
    call = contract.check(
        q, block_keys, coarse_ratio, coarse_topc, final_topk, mask, block_size, forced, kv_len, recall
    )
    return choose("hierarchical_block_select", BACKENDS, backend, call).run(call)
