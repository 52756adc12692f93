"""Joins the selected blocks of neighbouring queries, and keeps for each query which of them are its own."""

from typing import Literal

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import EXACT
from kernel_index.routing.membership import membership
from kernel_index.routing.union_selection_query_mask import contract
from kernel_index.routing.union_selection_query_mask.contract import UnionMode
from kernel_index.routing.union_selection_query_mask.eager import union_eager
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps
from kernel_index.routing.union_selection_query_mask.reference import union_reference
from kernel_index.routing.union_selection_query_mask.torch_op import union_triton

UnionBackend = Literal["auto", "triton", "eager", "reference"]

BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        union_triton,
        contract.triton_not_worth,
        details=contract.triton_details,
        invariant=EXACT,
    ),
    Backend("eager", always, union_eager, details=contract.details, invariant=EXACT),
    Backend("reference", always, union_reference, details=contract.details),
)


def union_selection(
    selected: Tensor,
    *,
    query_tile_size: int,
    num_blocks: int,
    selected_valid: Tensor | None = None,
    mode: UnionMode = "auto",
    backend: UnionBackend = "auto",
) -> UnionMaps:
    """The blocks that the queries of each tile selected, ascending, and where among them each query's own are.

    A tile is ``query_tile_size`` consecutive queries, the last one may be shorter.  Its union is a list of at most
    ``U = min(query_tile_size · n, num_blocks)`` blocks, so it cannot overflow.  Each entry leads back to its block, and
    no query gains a block that only its neighbours selected::

        union_block_indices[b, t // tile, g, query_union_indices[b, t, g, j]] == selected[b, t, g, j]     where valid

    Both modes give the same maps and static shapes, and wait for no device.  No gradient.

    Args:
        selected: integers [B, T, K, n], block indices in any order, duplicates allowed; negative for none.
        query_tile_size: queries of a tile.
        num_blocks: the number of blocks.
        selected_valid: bool [B, T, K, n], False where nothing is selected; None where the sign alone says it.
        mode: ``"bitmap"`` marks blocks in a table of ``num_blocks`` for each tile, ``"sort"`` sorts a tile's entries;
            ``"auto"`` sorts only where there are many more blocks than entries, and always on a GPU.
        backend: ``"auto"`` or a backend's name; ``"reference"`` has one form for all modes.

    Returns:
        ``UnionMaps``; a tile in which nothing is valid has size 0.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape or size does not fit, the mode is unknown, or an index on the host is beyond the last block.
        Ineligible: the named backend cannot run this call.

    Source: the union of rows in FlashInfer's sparse prefill and vLLM's query-shared attention, by other means.

    >>> import torch, kernel_index as ki
    >>> selected = torch.tensor([[4, 1], [1, -1], [0, 0]]).view(1, 3, 1, 2)
    >>> maps = ki.union_selection(selected, query_tile_size=2, num_blocks=5)
    >>> maps.union_block_indices.flatten(1).tolist(), maps.query_union_indices.flatten(1).tolist()
    ([[1, 4, -1, -1, 0, -1, -1, -1]], [[1, 0, 0, -1, 0, 0]])
    """
    call = contract.check(selected, query_tile_size, num_blocks, selected_valid, mode)
    return choose("union_selection", BACKENDS, backend, call).run(call)


def materialize_query_union_mask(maps: UnionMaps) -> Tensor:
    """Which blocks of its tile's union each query may use, bool [B, T, K, U]; for tests: kernels use the maps.

    Raises:
        TypeError: ``maps`` is not ``UnionMaps``.

    >>> import torch, kernel_index as ki
    >>> maps = ki.union_selection(torch.tensor([[[[0]], [[3]]]]), query_tile_size=2, num_blocks=4)
    >>> ki.materialize_query_union_mask(maps)[0, :, 0].int().tolist()
    [[1, 0], [0, 1]]
    """
    if not isinstance(maps, UnionMaps):
        raise TypeError(f"maps must be UnionMaps, got {type(maps).__name__}")
    return membership(maps.query_union_indices, maps.query_union_valid, maps.union_block_indices.shape[-1])
