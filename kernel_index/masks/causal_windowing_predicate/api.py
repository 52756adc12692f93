"""Which tiles of compressed key blocks a scoring loop has to visit."""

from dataclasses import dataclass
from typing import Any

from kernel_index.masks.causal_windowing_predicate import contract


def can_score_tile(tile_start: Any, block_stride: Any, q_chunk_end: Any) -> Any:
    """Whether a tile of compressed key blocks begins early enough for some query of a chunk.

    The test is ``tile_start · block_stride ≤ q_chunk_end``.  Block i summarises tokens from ``i · block_stride`` on, so
    every token of a tile whose first block begins after the last query is in the future.  The left side grows with the
    tile: a loop over ascending tiles stops at the first False.

    The test is necessary, not sufficient: each block of a tile that may be scored is still masked.  A block is
    *routable* for a query only if its last token is not after the query (``block_end ≤ q``).  A test of its first token
    would let later tokens of the block decide the selection, which leaks the future.  The current block, which holds
    the query, is always selected and masked token by token.

    Args:
        tile_start: index of the tile's first block, counted in blocks.
        block_stride: tokens from the beginning of a block to the beginning of the next one, positive.
        q_chunk_end: absolute position of the chunk's last query, inclusive.

    Returns:
        A bool for integers; a broadcast tensor or array of bools where one of the three is a torch or JAX array of
        integers.  Values of arrays are not read, so only an integer stride is checked to be positive.

    Raises:
        TypeError: an argument is neither an integer nor an array of integers.
        ValueError: a negative ``tile_start`` or a stride that is not positive, where they are integers.

    Source: the tile loop of compressed-key scoring in native sparse attention (Yuan et al., 2025).

    >>> import torch, kernel_index as ki
    >>> ki.can_score_tile(3, 16, 48), ki.can_score_tile(3, 16, 47)
    (True, False)
    >>> ki.can_score_tile(torch.arange(0, 12, 4), 16, 100)
    tensor([ True,  True, False])
    """
    contract.check_scalar_or_array("tile_start", tile_start, minimum=0)
    contract.check_scalar_or_array("block_stride", block_stride, minimum=1)
    contract.check_scalar_or_array("q_chunk_end", q_chunk_end)
    return tile_start * block_stride <= q_chunk_end


@dataclass(frozen=True, slots=True)
class WindowingPlan:
    """Which tiles of a scoring loop one chunk of queries needs.

    ``active_tiles`` are consecutive tile indices, ascending.  ``skipped_past_tiles`` counts the tiles before them,
    ``skipped_future_tiles`` those after them.  ``q_chunk_end`` is inclusive.  ``rule`` is the predicate as text.

    >>> import kernel_index as ki
    >>> ki.causal_windowing_plan(
    ...     num_blocks=8, tile_size=2, block_stride=16, q_chunk_start=32, q_chunk_size=32
    ... ).skipped_future_tiles
    2
    """

    q_chunk_end: int
    active_tiles: tuple[int, ...]
    skipped_future_tiles: int
    skipped_past_tiles: int
    rule: str


def causal_windowing_plan(
    *,
    num_blocks: int,
    tile_size: int,
    block_stride: int,
    q_chunk_start: int,
    q_chunk_size: int,
    left_window: int | None = None,
) -> WindowingPlan:
    """Split the tiles of compressed key blocks into past, active and future for one chunk of queries.

    There are ``ceil(num_blocks / tile_size)`` tiles.  Tile j holds the blocks ``j·tile_size … (j + 1)·tile_size − 1``,
    whose tokens begin at ``j·tile_size·block_stride`` and end before ``min((j + 1)·tile_size, num_blocks) ·
    block_stride``::

        future:  not can_score_tile(j·tile_size, block_stride, q_chunk_end)
        past:    end of the tile's tokens ≤ q_chunk_start − left_window        only with a left window
        active:  the others

    Args:
        num_blocks: number of compressed key blocks.
        tile_size: blocks for each tile.
        block_stride: tokens from the beginning of a block to the beginning of the next one: the tokens of a block.
        q_chunk_start: absolute position of the chunk's first query.
        q_chunk_size: queries in the chunk; the last one is at ``q_chunk_end = q_chunk_start + q_chunk_size − 1``.
        left_window: previous tokens that a query still sees; None or negative for all of them.

    Returns:
        A ``WindowingPlan``.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: a tile size, stride or chunk size is not positive, or a count or position is negative.

    Source: as ``can_score_tile``; the window is FlashAttention's, ``left_window=0`` is the token itself.

    >>> import kernel_index as ki
    >>> ki.causal_windowing_plan(
    ...     num_blocks=10, tile_size=2, block_stride=16, q_chunk_start=64, q_chunk_size=32, left_window=30
    ... )
    WindowingPlan(q_chunk_end=95, active_tiles=(1, 2), skipped_future_tiles=2, skipped_past_tiles=1, rule='64 − 30 < \
tile_end·16 and tile_start·16 ≤ 95')
    """
    contract.check_plan(num_blocks, tile_size, block_stride, q_chunk_start, q_chunk_size, left_window)
    window = None if left_window is None or left_window < 0 else left_window
    end = q_chunk_start + q_chunk_size - 1
    tiles = -(-num_blocks // tile_size)
    future = 0  # the first tile that lies wholly in the future
    while future < tiles and can_score_tile(future * tile_size, block_stride, end):
        future += 1
    past = 0
    rule = f"tile_start·{block_stride} ≤ {end}"
    if window is not None:
        rule = f"{q_chunk_start} − {window} < tile_end·{block_stride} and {rule}"
        oldest = q_chunk_start - window  # the first token that the first query still sees
        while past < future and min((past + 1) * tile_size, num_blocks) * block_stride <= oldest:
            past += 1
    return WindowingPlan(end, tuple(range(past, future)), tiles - future, past, rule)
