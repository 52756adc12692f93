"""The tokens that score best for each query by a light index, and their scores."""

from typing import Any, Literal

import torch
from torch import Tensor

from kernel_index.core import device_products, native
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.numerics import Recipe
from kernel_index.core.products import PRODUCT
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.paths import along_paths
from kernel_index.routing.lightning_indexer import contract
from kernel_index.routing.lightning_indexer.native import SOURCE
from kernel_index.routing.lightning_indexer.reference import lightning_indexer_reference
from kernel_index.routing.lightning_indexer.selection import TokenSelection
from kernel_index.routing.lightning_indexer.torch_op import (
    lightning_indexer_chunked,
    lightning_indexer_native,
    lightning_indexer_triton,
)

INDEX = Recipe(f"index 1: float32 scores of each head by {PRODUCT.text}, heads added in order, a stable sort")
INDEX_ON_A_GPU = Recipe(
    f"index on a GPU 1: float32 scores of each head by {device_products.PRODUCT.text}, heads added in order, the best "
    "of them, of equal ones the first"
)

IndexerBackend = Literal["auto", "triton", "native", "chunked", "reference"]

BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        lightning_indexer_triton,
        contract.triton_not_worth,
        contract.triton_details,
        INDEX_ON_A_GPU,
    ),
    Backend(
        "native",
        contract.native_why_not,
        lightning_indexer_native,
        native.once_built(SOURCE),
        contract.native_details,
        INDEX,
    ),
    Backend("chunked", contract.chunked_why_not, lightning_indexer_chunked, details=contract.chunked_details),
    Backend("reference", always, lightning_indexer_reference),
)


def lightning_indexer(
    q_idx: Tensor,
    k_idx: Tensor,
    weights: Tensor,
    *,
    topk: int,
    mask: MaskContract | None = None,
    replay: TokenSelection | None = None,
    backend: IndexerBackend = "auto",
) -> TokenSelection:
    """The ``topk`` best tokens of each query by the indexer's score, exactly, and the same ones every time.

    ::

        I[t, s] = Σ_j weights[t, j] · relu(q_idx[t, j]·k_idx[s])          over the keys s that the mask allows

    in float32; among equal scores the smallest index wins, and relu makes many of them 0.  A query with fewer than
    ``topk`` allowed keys selects them all.  Scores are formed in tiles of keys; those of all queries are never stored
    together.

    The selection has no gradient.  The scores have that of the formula at the selected tokens, which is what a loss for
    the indexer trains: see ``lightning_indexer_loss``.

    Args:
        q_idx: [B, T, J, D], any floating dtype; J is the number of the indexer's heads.  Under autocast q_idx, k_idx
            and weights are cast as the arguments of ``F.scaled_dot_product_attention``.
        k_idx: [B, S, D], q_idx's dtype; one key for all heads.
        weights: [B, T, J], q_idx's dtype or float32; any scale of the scores belongs in here.
        topk: tokens for each query, at least 1.
        mask: which keys each query may attend to; causal by default.
        replay: a recorded selection: its tokens are returned, without those that this mask forbids, and with the scores
            that they have now.  For recomputation, and for training on what a rollout attended to.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``TokenSelection(indices, valid, scores)``, each [B, T, topk]; what ``exact_token_attention`` takes.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: the lightning indexer of DeepSeek-V3.2 (DeepSeek-AI, 2025), in float32.

    >>> import torch, kernel_index as ki
    >>> q, k = torch.ones(1, 4, 1, 1), torch.tensor([2.0, 5.0, 2.0, -1.0]).view(1, 4, 1)
    >>> ki.lightning_indexer(q, k, torch.ones(1, 4, 1), topk=2).indices[0].tolist()
    [[0, -1], [1, 0], [1, 0], [1, 0]]
    """
    call = contract.check(q_idx, k_idx, weights, topk, EVERYTHING_BEFORE if mask is None else mask, replay)
    if call.mask.is_tree:

        def route_branch(q: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            *recorded, k, places, mask = rest
            replay = None if not recorded else TokenSelection(*recorded).within(places)
            return lightning_indexer(q, k, weights, topk=topk, mask=mask, replay=replay, backend=backend).of_row(places)

        places = torch.arange(call.k.shape[1], device=call.k.device).expand(call.k.shape[:2])
        by_query = (call.q, call.weights, *(call.replay or ()))
        indices, valid, scores = along_paths(
            "lightning_indexer", route_branch, call.mask, call.sizes, by_query, (call.k, places), (1, 1, 1)
        )
        return TokenSelection(torch.where(valid, indices, -1), valid, torch.where(valid, scores, -torch.inf))
    return choose("lightning_indexer", BACKENDS, backend, call).run(call)
