"""Mean keys of the blocks of a cache, for routers: each is computed once, in the step that completes its block.

A block that is still growing has no mean: routers select the block of the query itself without scoring it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.kvcache.slots import Slots, slots

TOKENS_AT_ONCE = 1 << 14
"""Keys that are averaged at a time: a long prompt completes many blocks in one step."""


class Row(NamedTuple):
    """One row of a step: its row or sequence number, tokens cached before the step and after it, its pages in order."""

    name: int
    before: int
    after: int
    pages: list[int] | None


class BlockMeans:
    """The means of all complete blocks of a cache's keys, stored with each block's last token.

    So they are shared, copied and freed with its page, whatever the sizes of blocks and pages: sequences that share
    that page share all tokens before it.

    Args:
        keys: the cache's keys [layers, rows or pages, tokens, K, D].
        block_size: tokens of a block.
        paged: whether the cache is in pages; a block may be smaller or larger than a page.
    """

    def __init__(self, keys: Tensor, block_size: int, *, paged: bool):
        layers, outer, inner, *heads = keys.shape
        self.keys, self.block_size = keys, block_size
        self.unit = math.gcd(block_size, inner) if paged else block_size  # at most one block ends in a unit
        dtype = torch.promote_types(keys.dtype, torch.float32)
        self.values = torch.zeros(layers, outer, inner // self.unit, *heads, dtype=dtype, device=keys.device)
        self.known: list[dict[int, int]] = [{} for _ in range(layers)]  # complete blocks of each row
        self.pending: list[list[Row] | None] = [None] * layers  # the step whose means are not confirmed yet
        self.by_kernel: list[list[Row] | None] = [None] * layers  # the step whose means a kernel has written
        self.computed = 0  # blocks averaged so far, over all layers

    def share(self, source: int, copy: int) -> None:
        """A new row with the pages of another."""
        for known in self.known:
            known[copy] = known.get(source, 0)

    def forget(self, row: int) -> None:
        """A row that was freed or emptied."""
        for known in self.known:
            known.pop(row, None)

    def confirm(self, rows: list[Row], kept: list[int]) -> None:
        """So many tokens of each row of a step have come to stay, and with them the means of the blocks that they end.

        The means of a step that is never confirmed, as other keys may take its place, are averaged again.
        """
        complete = {row.name: (row.before + n) // self.block_size for row, n in zip(rows, kept, strict=True)}
        for known, pending in zip(self.known, self.pending, strict=True):
            if pending is rows:
                known.update(complete)

    def of(self, layer: int, rows: list[Row], table: Tensor | None) -> Tensor:
        """The means [B, blocks, K, D] of every row's complete blocks, at least float32, brought up to date.

        ``blocks`` is that of the longest row; a shorter row has finite values of no meaning after its own.
        """
        if self.by_kernel[layer] is not rows:
            self._catch_up(layer, rows, [row.after // self.block_size for row in rows])
        blocks = max((row.after for row in rows), default=0) // self.block_size
        values = self.values[layer]
        if table is None:
            return values[:, :blocks]
        last = torch.arange(1, blocks + 1, device=table.device) * self.block_size - 1
        outer, inner = slots(table, last.expand(table.shape[0], -1), self.keys.shape[2])
        return values[outer, inner // self.unit]

    def stored(self, layer: int, rows: list[Row]) -> Tensor:
        """The memory of a layer's means [rows or pages, units, K, D], for a kernel that writes keys and means at once.

        Blocks that were complete before the step are brought up to date here, which in most steps is nothing to do;
        the kernel averages those that the step completes.
        """
        before = [row.before // self.block_size for row in rows]
        self._catch_up(layer, rows, before)
        self.by_kernel[layer] = rows
        self.computed += sum(row.after // self.block_size for row in rows) - sum(before)
        return self.values[layer]

    def _catch_up(self, layer: int, rows: list[Row], complete: list[int]) -> None:
        """Average the blocks of each row that are not known, of the first ``complete`` ones."""
        known = self.known[layer]
        for row, end in zip(rows, complete, strict=True):
            have = min(known.get(row.name, 0), row.before // self.block_size)
            if have < end:
                self._average(layer, row, have, end)
            known[row.name] = row.before // self.block_size
        self.pending[layer] = rows

    def _average(self, layer: int, row: Row, have: int, complete: int) -> None:
        """Average the blocks ``have ≤ j < complete`` of one row."""
        size = self.block_size
        self.computed += complete - have
        step = max(1, TOKENS_AT_ONCE // size)
        for first in range(have, complete, step):
            end = min(first + step, complete)
            outer, inner = self._slots(row, torch.arange(first * size, end * size, device="cpu").view(-1, size))
            means = self.keys[layer][outer, inner].to(self.values.dtype).mean(1)
            self.values[layer].index_put_((outer[:, -1], inner[:, -1] // self.unit), means)

    def _slots(self, row: Row, token: Tensor) -> Slots:
        """The slots of tokens of one row, on the cache's device."""
        table = None if row.pages is None else torch.tensor([row.pages], device="cpu")
        found = slots(table, token[None], self.keys.shape[2], first_row=row.name)
        return Slots(*(x[0].to(self.keys.device, non_blocking=True) for x in found))
