"""Any mask for a kernel that visits the tiles of a list and asks a predicate within those that are partly allowed."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.doc_window_mask.intervals import RowBounds, Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.tiles import listed

Lists = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of partly allowed tiles counts int32 [rows, 1, n] and indices [rows, 1, n, m], and the same of full ones."""


class TileMask(NamedTuple):
    """``bounds`` are those of ``RowBounds``, int32 [B, T] and [B, S], longer by up to a tile that nobody sees.

    ``by_query``: for each tile of queries, its tiles of keys; ``by_key`` the reverse.  ``predicate`` is the name of the
    simplest one that is right: ``causal``, ``interval`` or ``path``.
    """

    predicate: str
    bounds: tuple[Tensor, ...]
    by_query: Lists
    by_key: Lists


def tile_mask(mask: MaskContract, sizes: Sizes, tile: tuple[int, int]) -> TileMask:
    """The mask in tiles of ``(queries, keys)``; nothing waits for the device, and the contract keeps the result."""

    def build() -> tuple[Tensor, ...]:
        bounds = mask.row_bounds(sizes)
        sides = (listed(bounds, sizes.keys, tile, by_key=by_key) for by_key in (False, True))
        lists = [x[:, None].contiguous() for side in sides for kind in side for x in kind]
        return (*lists, *_padded(bounds, sizes, tile))

    kept = mask.remember("tile_mask", (tile, sizes), build)
    by_query, by_key, bounds = kept[:4], kept[4:8], kept[8:]
    predicate = "path" if len(bounds) == 3 else "causal" if _is_causal(mask, sizes) else "interval"
    return TileMask(predicate, bounds, by_query, by_key)


def _is_causal(mask: MaskContract, sizes: Sizes) -> bool:
    """Whether each query that sees a key sees itself last."""
    if mask.window_bounds[1] != 0 or mask.prefix is not None or mask.key_counts is not None:
        return False
    return sizes.queries == sizes.keys and sizes.offset == 0


def _padded(bounds: RowBounds, sizes: Sizes, tile: tuple[int, int]) -> tuple[Tensor, ...]:
    """A tile is read to its end; a query without keys begins beyond all of them."""
    start, end, q_end = bounds
    beyond = sizes.keys + tile[1]
    padded = [
        _as_long(torch.where(start < end, start, beyond), sizes.batch, tile[0], beyond),
        _as_long(end, sizes.batch, tile[0], 0),
    ]
    return (*padded, *([] if q_end is None else [_as_long(q_end, sizes.batch, tile[1], 0)]))


def _as_long(x: Tensor, rows: int, tile: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % tile), value=filler).expand(rows, -1).contiguous()
