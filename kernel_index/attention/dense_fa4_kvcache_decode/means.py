"""Means of the blocks of a cache, for routers: each is computed once, in the step that completes its block.

A block that is still growing has no mean: routers take the block of the query itself without scoring it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.attention.dense_fa4_kvcache_decode.append import gathered

TOKENS_AT_ONCE = 1 << 14
"""Keys that are averaged in one go: a long prompt completes many blocks in one step."""


class Row(NamedTuple):
    """One row of a step: its name in the books, tokens cached before the step and after it, its pages in order."""

    name: int
    before: int
    after: int
    pages: list[int] | None


class BlockMeans:
    """The means of all complete blocks of a cache's keys, kept where the keys are: they move and are shared as pages.

    What is stored are means of ``unit`` tokens, the largest size of which blocks and pages are both multiples.

    Args:
        keys: the cache's keys [layers, rows or pages, tokens, K, D].
        block_size: tokens of a block.
        paged: whether the cache is in pages, which blocks may be smaller or larger than.
    """

    def __init__(self, keys: Tensor, block_size: int, *, paged: bool):
        layers, outer, inner, *heads = keys.shape
        self.keys, self.block_size = keys, block_size
        self.unit = math.gcd(block_size, inner) if paged else block_size
        dtype = torch.promote_types(keys.dtype, torch.float32)
        self.values = torch.zeros(layers, outer, inner // self.unit, *heads, dtype=dtype, device=keys.device)
        self.known: list[dict[int, int]] = [{} for _ in range(layers)]
        self.computed = 0  # units averaged so far, over all layers

    def share(self, source: int, copy: int) -> None:
        """A new row with the pages of another."""
        for known in self.known:
            known[copy] = known.get(source, 0)

    def forget(self, row: int) -> None:
        """A row that is gone."""
        for known in self.known:
            known.pop(row, None)

    def of(self, layer: int, rows: list[Row], table: Tensor | None) -> Tensor:
        """The means [B, blocks, K, D] of every row's complete blocks, at least float32, brought up to date.

        ``blocks`` is that of the longest row; a shorter row has anything finite behind its own.
        """
        self._update(layer, rows)
        units = gathered(self.values[layer], table)
        blocks = max((row.after for row in rows), default=0) // self.block_size
        per_block = self.block_size // self.unit
        units = units[:, : blocks * per_block]
        return units if per_block == 1 else units.unflatten(1, (blocks, per_block)).mean(2)

    def _update(self, layer: int, rows: list[Row]) -> None:
        """Average what this step completes.  What an abandoned step had put behind ``before`` counts as unknown."""
        known, per_outer = self.known[layer], self.values.shape[2]
        places: list[tuple[int, int]] = []
        for row in rows:
            have, complete = min(known.get(row.name, 0), row.before // self.unit), row.after // self.unit
            for at in range(have, complete):
                places.append((row.name, at) if row.pages is None else (row.pages[at // per_outer], at % per_outer))
            known[row.name] = complete
        units = self.keys[layer][:, : per_outer * self.unit].unflatten(1, (per_outer, self.unit))
        step = max(1, TOKENS_AT_ONCE // self.unit)
        for chunk in (places[i : i + step] for i in range(0, len(places), step)):
            at = torch.tensor(chunk, dtype=torch.int64).to(self.keys.device, non_blocking=True).unbind(1)
            self.values[layer].index_put_(at, units[at].to(self.values.dtype).mean(1))
        self.computed += len(places)
