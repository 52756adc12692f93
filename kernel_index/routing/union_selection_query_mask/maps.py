"""The maps between the blocks that a query selected and the union of its tile."""

from typing import NamedTuple

from torch import Tensor


class UnionTelemetry(NamedTuple):
    """How much the queries of a tile share; ``U`` is the size of a tile's union, ``n`` the blocks of a query.

    ``U/n`` is 1 where all queries of a tile agree; ``U/blocks`` is 1 where the tile reads everything.
    """

    mean_over_picks: float
    max_over_picks: float
    mean_over_blocks: float
    max_over_blocks: float


class UnionMaps(NamedTuple):
    """Which blocks the queries of a tile selected, and which of them are each query's own.

    ``union_block_indices`` int32 [B, tiles, K, U], ascending, then −1; ``union_sizes`` int32 [B, tiles, K];
    ``query_union_indices`` int32 [B, T, K, n], where in its tile's union each selected block is, −1 for none;
    ``query_union_valid`` bool [B, T, K, n].

    >>> import torch, kernel_index as ki
    >>> maps = ki.union_selection(torch.tensor([[[[0, 2]], [[2, 5]]]]), query_tile_size=2, num_blocks=6)
    >>> maps.union_block_indices.tolist(), maps.union_sizes.tolist()
    ([[[[0, 2, 5, -1]]]], [[[3]]])
    """

    union_block_indices: Tensor
    union_sizes: Tensor
    query_union_indices: Tensor
    query_union_valid: Tensor

    def telemetry(self, num_blocks: int) -> UnionTelemetry:
        """Mean and largest U/n and U/blocks; reads the sizes, so it waits for the device.

        >>> import torch, kernel_index as ki
        >>> maps = ki.union_selection(torch.tensor([[[[0, 2]], [[2, 5]]]]), query_tile_size=2, num_blocks=6)
        >>> maps.telemetry(num_blocks=6).mean_over_picks
        1.5
        """
        sizes = self.union_sizes.double()
        mean, largest = (float(sizes.mean()), float(sizes.max())) if sizes.numel() else (0.0, 0.0)
        each, blocks = max(1, self.query_union_indices.shape[-1]), max(1, num_blocks)
        return UnionTelemetry(mean / each, largest / each, mean / blocks, largest / blocks)
