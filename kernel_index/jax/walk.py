"""How a TPU kernel walks over the blocks of one row while the next block is on its way.

A row is whatever one grid step owns: a tile of queries that visits blocks of keys, or a block of keys that visits tiles
of queries.  The grid covers batch, key heads and rows and is static; how many blocks a row visits, and which, is read
from scalar memory.  So nothing is fetched or computed for a block that is not on a row's list, a plan costs a few
integers for each row, and one compilation serves every batch.

Copies are double-buffered across the ends of rows: while the last blocks of a row are computed, the first ones of the
next row are fetched.  Rows of one head follow each other (the grid's last dimension is sequential); heads need not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Walk(NamedTuple):
    """Which blocks each row visits.

    ``spans`` int32 [B', K', 1 + width, rows]: how many, and the first ``width`` of them.  ``lists`` int32
    [B, K, rows, 1, U]: all of them, or None where they follow each other.  B' and K' are 1 where all rows are alike.
    """

    spans: jax.Array
    lists: jax.Array | None

    @property
    def width(self) -> int:
        """Blocks that one step fetches and computes together."""
        return self.spans.shape[2] - 1

    @property
    def rows(self) -> int:
        return self.spans.shape[3]


def ranges(first: jax.Array, count: jax.Array) -> Walk:
    """Rows that visit ``first ≤ j < first + count``; int32 [B', rows] each."""
    return Walk(jnp.stack([count, first], 1)[:, None].astype(jnp.int32), None)


def listed(lists: jax.Array, counts: jax.Array, width: int) -> Walk:
    """Rows that visit ``lists[..., :count]``; int32 [B, K, rows, U] and [B, K, rows]."""
    columns = lists.shape[-1]
    if columns < width:
        lists = jnp.pad(lists, ((0, 0), (0, 0), (0, 0), (0, width - columns)))
    heads = jnp.moveaxis(lists[..., :width], -1, 2)
    spans = jnp.concatenate([counts[:, :, None], heads], 2)
    return Walk(spans.astype(jnp.int32), lists[:, :, :, None].astype(jnp.int32))


def smem_specs(walk: Walk) -> list[pl.BlockSpec]:
    """The walk in scalar memory: the spans of a head at once, the list of one row at a time."""
    alike = tuple(size == 1 for size in walk.spans.shape[:2])
    specs = [
        pl.BlockSpec(
            (1, 1, *walk.spans.shape[2:]),
            lambda b, h, r: (0 if alike[0] else b, 0 if alike[1] else h, 0, 0),
            memory_space=pltpu.SMEM,
        )
    ]
    if walk.lists is not None:
        block = (1, 1, 1, 1, walk.lists.shape[-1])
        specs.append(pl.BlockSpec(block, lambda b, h, r: (b, h, r, 0, 0), memory_space=pltpu.SMEM))
    return specs


class Steps:
    """The walk of the current row inside a kernel.

    Args:
        spans, lists: the refs of ``smem_specs``; ``lists`` is None for ranges.
        width: blocks of one step.
        copies: ``(row, block, slot, place) -> copies`` that bring a row's block into part ``place`` of a buffer.
        slot_ref: int32 [1] in scalar memory, the buffer in which the row's first blocks arrive.
    """

    def __init__(self, spans: Any, lists: Any, width: int, copies: Callable[..., tuple], slot_ref: Any):
        self.spans, self.lists, self.width, self.copies, self.slot_ref = spans, lists, width, copies, slot_ref
        self.row = pl.program_id(2)
        self.count = spans[0, 0, 0, self.row]

    def entry(self, i: Any) -> Any:
        """The i-th block of this row."""
        return self.spans[0, 0, 1, self.row] + i if self.lists is None else self.lists[0, 0, 0, 0, i]

    def run(self, compute: Callable[[Any, Any], None]) -> None:
        """Call ``compute(step, slot)`` for each step, its blocks having arrived, the next ones on their way."""
        rows = pl.num_programs(2)
        following = jnp.minimum(self.row + 1, rows - 1)
        after = jnp.where(self.row + 1 < rows, self.spans[0, 0, 0, following], 0)

        def start_following(slot: Any) -> None:
            self._each(following, after, 0, lambda i: self.spans[0, 0, 1 + i, following], slot, "start")

        @pl.when(self.row == 0)
        def _() -> None:
            self.slot_ref[0] = 0
            self._each(self.row, self.count, 0, self.entry, 0, "start")

        @pl.when(self.count == 0)
        def _() -> None:
            start_following(self.slot_ref[0])

        steps = pl.cdiv(self.count, self.width)

        def step(g: Any, slot: Any) -> Any:
            @pl.when(g + 1 < steps)
            def _() -> None:
                self._each(self.row, self.count, (g + 1) * self.width, self.entry, 1 - slot, "start")

            @pl.when(g + 1 == steps)
            def _() -> None:
                start_following(1 - slot)

            self._each(self.row, self.count, g * self.width, self.entry, slot, "wait")
            compute(g, slot)
            return 1 - slot

        self.slot_ref[0] = lax.fori_loop(0, steps, step, self.slot_ref[0])

    def _each(self, row: Any, count: Any, begin: Any, entry: Callable[[Any], Any], slot: Any, action: str) -> None:
        """Start or await the copies of the blocks ``begin … begin + width − 1``, as far as there are so many."""
        for place in range(self.width):

            @pl.when(begin + place < count)
            def _(place: int = place) -> None:
                for copy in self.copies(row, entry(begin + place), slot, place):
                    getattr(copy, action)()
