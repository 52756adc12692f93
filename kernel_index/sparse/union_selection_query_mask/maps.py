"""The maps between a query's own picks and the union of its tile."""

from typing import NamedTuple

from torch import Tensor


class UnionMaps(NamedTuple):
    """Which blocks a tile of queries picked together, and which of them are each query's own.

    ``union_block_indices`` int32 [B, tiles, G, U], ascending, −1 behind the end; ``union_sizes`` int32 [B, tiles, G];
    ``query_union_indices`` int32 [B, T, G, n], the place of each pick in its tile's union, −1 for no pick;
    ``query_union_valid`` bool [B, T, G, n].
    """

    union_block_indices: Tensor
    union_sizes: Tensor
    query_union_indices: Tensor
    query_union_valid: Tensor
