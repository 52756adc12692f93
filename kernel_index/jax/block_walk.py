"""How a TPU kernel walks over the blocks of one row while the next block is on its way.

A row is what one cell of the grid computes: a tile of queries that visits blocks of keys, or a block of keys that
visits tiles of queries.  The grid covers batch, KV heads and rows and is static; how many blocks a row visits, and
which, is read from scalar memory.  So nothing is fetched or computed for a block that is not on a row's list, a plan
costs a few integers for each row, and one compilation serves every batch.

A chunk is the ``width`` blocks that are fetched and computed together; the last chunk of a row may hold fewer.

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
    [B', K', rows, 1, U]: all of them, or None where they follow each other.  B' and K' are 1 where all rows are alike.
    """

    spans: jax.Array
    lists: jax.Array | None

    @property
    def width(self) -> int:
        """Blocks of a chunk."""
        return self.spans.shape[2] - 1

    @property
    def rows(self) -> int:
        return self.spans.shape[3]

    def narrowed(self, width: int) -> "Walk":
        """The same rows in chunks of at most ``width`` blocks."""
        return Walk(self.spans[:, :, : 1 + width], self.lists)


def ranges(first: jax.Array, count: jax.Array) -> Walk:
    """Rows that visit ``first ≤ j < first + count``; int32 [B', rows] each."""
    return Walk(jnp.stack([count, first], 1)[:, None].astype(jnp.int32), None)


def listed(lists: jax.Array, counts: jax.Array, width: int) -> Walk:
    """Rows that visit ``lists[..., :count]``; int32 [B', K', rows, U] and [B', K', rows]."""
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
        index = lambda b, h, r: (0 if alike[0] else b, 0 if alike[1] else h, r, 0, 0)  # noqa: E731
        specs.append(pl.BlockSpec(block, index, memory_space=pltpu.SMEM))
    return specs


def inverted(walk: Walk, blocks: int) -> Walk:
    """The inverted walk (CSR to CSC): for each of ``blocks`` blocks the tiles that visit it, ascending, width 1."""
    count = walk.spans[:, :, 0]  # [B', K', tiles]
    if walk.lists is None:
        first = walk.spans[:, 0, 1]  # [B', tiles]
        end = lax.cummax(first + count[:, 0], axis=1)  # an empty tile between others must not break the order
        block = jnp.arange(blocks, dtype=jnp.int32)
        search = jax.vmap(lambda bounds: jnp.searchsorted(bounds, block, side="right"))
        begin = search(end).astype(jnp.int32)  # [B', blocks]
        return ranges(begin, jnp.maximum(search(first).astype(jnp.int32) - begin, 0))
    lists = walk.lists[:, :, :, 0]  # [B', K', tiles, U]
    visited = jnp.where(jnp.arange(lists.shape[-1]) < count[..., None], lists, blocks)
    marks = jnp.zeros((*visited.shape[:3], blocks), bool)  # [B', K', tiles, blocks]
    row = jnp.meshgrid(*(jnp.arange(n) for n in visited.shape[:3]), indexing="ij")
    marks = marks.at[(*(i[..., None] for i in row), visited)].set(True, mode="drop")
    return listed(*marked_first(marks.swapaxes(2, 3)), width=1)


def marked_first(marks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The indices along the last dimension, the marked ones first, each group ascending; and how many are marked."""
    order = jnp.argsort(~marks, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(marks, -1, dtype=jnp.int32)


class PrefetchLoop:
    """The loop of a kernel over the chunks of the current row; it fetches a chunk while the one before is computed.

    Args:
        spans, lists: the refs of ``smem_specs``; ``lists`` is None for ranges.
        width: blocks of a chunk.
        copies: ``(row, block, slot, i) -> copies`` of a row's block, the i-th of its chunk, into buffer ``slot``.
        slot_ref: int32 [1] in scalar memory, the buffer into which the row's first chunk is copied.
    """

    def __init__(self, spans: Any, lists: Any, width: int, copies: Callable[..., tuple], slot_ref: Any):
        self.spans, self.lists, self.width, self.copies, self.slot_ref = spans, lists, width, copies, slot_ref
        self.row = pl.program_id(2)
        self.count = spans[0, 0, 0, self.row]

    def entry(self, i: Any) -> Any:
        """The i-th block of this row."""
        return self.spans[0, 0, 1, self.row] + i if self.lists is None else self.lists[0, 0, 0, 0, i]

    def run(self, compute: Callable[[Any, Any], None]) -> None:
        """Call ``compute(chunk, slot)`` once a chunk has arrived, while the next one is on its way."""
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

        chunks = pl.cdiv(self.count, self.width)

        def take(chunk: Any, slot: Any) -> Any:
            @pl.when(chunk + 1 < chunks)
            def _() -> None:
                self._each(self.row, self.count, (chunk + 1) * self.width, self.entry, 1 - slot, "start")

            @pl.when(chunk + 1 == chunks)
            def _() -> None:
                start_following(1 - slot)

            self._each(self.row, self.count, chunk * self.width, self.entry, slot, "wait")
            compute(chunk, slot)
            return 1 - slot

        self.slot_ref[0] = lax.fori_loop(0, chunks, take, self.slot_ref[0])

    def _each(self, row: Any, count: Any, begin: Any, entry: Callable[[Any], Any], slot: Any, action: str) -> None:
        """Start or await the copies of the blocks ``begin … begin + width − 1`` that are below ``count``."""
        for i in range(self.width):

            @pl.when(begin + i < count)
            def _(i: int = i) -> None:
                for copy in self.copies(row, entry(begin + i), slot, i):
                    getattr(copy, action)()


def by_chunks(
    loop: PrefetchLoop, size: int, attend: Callable[[Any, Any, list[Any]], None]
) -> Callable[[Any, Any], None]:
    """``compute`` for ``PrefetchLoop.run``: all blocks of a full chunk at once, those of an incomplete one in turn.

    ``attend(slot, at, blocks)`` computes the given blocks, which begin at row ``at`` of buffer ``slot``.
    """

    def compute(chunk: Any, slot: Any) -> None:
        begin = chunk * loop.width
        if loop.width == 1:
            attend(slot, 0, [loop.entry(begin)])
            return

        @pl.when(begin + loop.width <= loop.count)
        def _() -> None:
            attend(slot, 0, [loop.entry(begin + i) for i in range(loop.width)])

        @pl.when(begin + loop.width > loop.count)
        def _() -> None:
            def one(i: Any, _: Any) -> Any:
                attend(slot, pl.multiple_of(i * size, size), [loop.entry(begin + i)])
                return 0

            lax.fori_loop(0, loop.count - begin, one, 0)

    return compute


def kv_copies(k_hbm: Any, v_hbm: Any, q_end_hbm: Any, buffers: list[Any], sems: Any, size: int) -> Callable[..., tuple]:
    """``copies`` for ``PrefetchLoop`` where the blocks hold keys and values, and in a tree ``TileMasks.q_end``."""
    b, h = pl.program_id(0), pl.program_id(1)

    def copies(_: Any, block: Any, slot: Any, i: int) -> tuple:
        source = pl.ds(pl.multiple_of(block * size, size), size)
        target = pl.ds(i * size, size)
        pairs = [(x.at[b, h, source], y.at[slot, target]) for x, y in zip((k_hbm, v_hbm), buffers[:2], strict=True)]
        if q_end_hbm is not None:  # one block at a time: the walk of a tree has width 1
            pairs.append((q_end_hbm.at[0 if q_end_hbm.shape[0] == 1 else b, block], buffers[2].at[slot]))
        return tuple(pltpu.make_async_copy(x, y, sems.at[n, slot, i]) for n, (x, y) in enumerate(pairs))

    return copies
