"""Phases 2 and 3: the unions of neighbouring queries where they are asked for, and attention."""

from typing import NamedTuple

from torch import Tensor

from kernel_index.core.dispatch import Backend, Choice
from kernel_index.kernels.sparse.clustered_sparse_three_phase.contract import ClusteredCall
from kernel_index.routing.legal_blocks import TopBlocks, num_blocks
from kernel_index.routing.union_selection_query_mask.api import BACKENDS as UNIONS
from kernel_index.routing.union_selection_query_mask.contract import UnionCall, resolve_mode
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps, UnionTelemetry


class Joined(NamedTuple):
    """Phases 1 and 2 of a call that asks for the sizes of its unions, and what those sizes say."""

    selected: TopBlocks
    maps: UnionMaps
    joined_by: str
    unions: UnionTelemetry
    above: bool  # whether the unions hold more than the config allows


def join(choice: Choice, call: ClusteredCall, router: Choice) -> Joined:
    """Route and join before attention is decided on; waits for the device."""
    config, blocks = call.config, num_blocks(call.k.shape[1], call.config.block_size)
    selected = router.run_inside(call.routing)
    union_call = UnionCall(selected.indices, selected.valid, config.query_tile_size, blocks, config.union_mode)
    union = choice.choose("union_selection", UNIONS, union_call)
    maps = union.run_inside(union_call)
    unions = maps.telemetry(blocks)
    above = config.dense_above is not None and unions.mean_over_blocks > config.dense_above
    mode = resolve_mode(config.union_mode, config.query_tile_size * selected.indices.shape[3], blocks)
    return Joined(selected, maps, mode if union.backend.name == "eager" else union.backend.name, unions, above)


def run_sparse(core: Backend, call: ClusteredCall, router: Choice, joined: Joined | None) -> tuple[Tensor, Tensor]:
    """``core`` and ``router`` were chosen before: nothing is chosen here."""
    if joined is None:  # a backend that needs unions makes them by its own tiles
        selected, maps = router.run_inside(call.routing), None
    else:
        selected, maps = joined.selected, joined.maps
    return core.run(call.on_core(selected.indices, selected.valid, maps))


def run_dense(dense: Backend, call: ClusteredCall) -> tuple[Tensor, Tensor | None]:
    return dense.run(call.dense)
