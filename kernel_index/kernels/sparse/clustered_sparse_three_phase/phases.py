"""The three phases in their order."""

from torch import Tensor

from kernel_index.core.dispatch import Backend
from kernel_index.kernels.attention.dense_attention.api import attention, attention_with_lse
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseCall
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.kernels.sparse.clustered_sparse_three_phase.contract import Routed
from kernel_index.kernels.sparse.clustered_sparse_three_phase.scoring import pick_blocks
from kernel_index.masks.attention_arguments import sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.legal_blocks import TopBlocks, num_blocks
from kernel_index.routing.union_selection_query_mask.api import union_selection
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps


def join(picks: TopBlocks, keys: int, config: ClusteredSparseConfig) -> UnionMaps:
    """Phase 2."""
    return union_selection(
        picks.indices,
        query_tile_size=config.query_tile_size,
        num_blocks=num_blocks(keys, config.block_size),
        selected_valid=picks.valid,
        mode=config.union_mode,
    )


def routed(q: Tensor, k: Tensor, config: ClusteredSparseConfig, mask: MaskContract) -> Routed:
    """Phases 1 and 2 and what their values say; waits for the device."""
    picks = pick_blocks(q, k, config, mask, sizes_of(q, k, mask))
    maps = join(picks, k.shape[1], config)
    unions = maps.telemetry(num_blocks(k.shape[1], config.block_size))
    above = config.dense_above is not None and unions.mean_over_blocks > config.dense_above
    return Routed(picks, maps, unions, above)


def run_sparse(
    core: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: ClusteredSparseConfig,
    mask: MaskContract,
    scale: float | None,
    softcap: float,
    known: Routed | None,
) -> tuple[Tensor, Tensor]:
    """``core`` was chosen before and is not chosen again, so that the receipt tells what ran."""
    if known is None:  # a backend joins picks by its own tiles, if it does
        picks, maps = pick_blocks(q, k, config, mask, sizes_of(q, k, mask)), None
    else:
        picks, maps = known.picks, known.maps
    tile = config.query_tile_size
    return core.run(BlockSparseCall(q, k, v, *picks, config.block_size, mask, scale, softcap, tile, maps))


def run_dense(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: ClusteredSparseConfig,
    mask: MaskContract,
    scale: float | None,
    softcap: float,
    known: Routed | None,
    *,
    with_lse: bool,
) -> tuple[Tensor, ...]:
    """What a call attends with where its unions hold too much; ``backend`` is the dense wrapper's."""
    if with_lse:
        return attention_with_lse(q, k, v, mask, scale=scale, softcap=softcap, backend=backend)
    return (attention(q, k, v, mask, scale=scale, softcap=softcap, backend=backend),)
