"""Which key tiles a scoring loop has to look at."""

from dataclasses import dataclass
from typing import Any

from kernel_index.masks.causal_windowing_predicate import contract


def can_score_tile(tile_start: Any, block_stride: Any, q_chunk_end: Any) -> Any:
    """Whether a tile of compressed key blocks begins early enough for some query of a chunk.

    ``tile_start · block_stride ≤ q_chunk_end``: block i stands for the tokens from ``i · block_stride`` on, so a tile
    whose first block begins after the last query holds nothing but the future.  The left side grows with the tile:
    a loop over tiles in ascending order stops at the first False.

    Necessary, not sufficient: inside a tile that may be scored each block is still masked.  A block is *routable* for a
    query only when it lies wholly in the past (``block_end ≤ q``); a test of its first token alone would let the
    content of later tokens of the block choose, which is a leak.  The block that holds the query is always selected
    and masked token by token.

    Args:
        tile_start: index of the tile's first block, counted in blocks.
        block_stride: tokens from one block's beginning to the next one's, positive.
        q_chunk_end: absolute position of the chunk's last query, inclusive.

    Returns:
        A bool for integers; a tensor or array of bools, broadcast, where any of the three is a torch or JAX array of
        integers.  No array's values are read: the check that the stride is positive needs an int.

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

    ``active_tiles`` are indices of tiles, ascending and without a gap; those after them are ``skipped_future_tiles`` in
    number, those before them ``skipped_past_tiles``.  ``q_chunk_end`` is inclusive.  ``rule`` is the predicate as text.

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

    Tile j of the ``ceil(num_blocks / tile_size)`` holds the blocks ``j·tile_size … (j + 1)·tile_size − 1`` and with
    them the tokens from ``j·tile_size·block_stride`` up to, not including, ``min((j + 1)·tile_size, num_blocks) ·
    block_stride``::

        future:  not can_score_tile(j·tile_size, block_stride, q_chunk_end)
        past:    end of the tile's tokens ≤ q_chunk_start − left_window        only with a left window
        active:  the others

    Args:
        num_blocks: compressed key blocks there are.
        tile_size: blocks for each tile.
        block_stride: tokens from one block's beginning to the next one's, and the tokens a block stands for.
        q_chunk_start: absolute position of the chunk's first query.
        q_chunk_size: queries in the chunk; the last one stands at ``q_chunk_end = q_chunk_start + q_chunk_size − 1``.
        left_window: previous tokens that a query still sees; None or negative for all of them.

    Returns:
        A ``WindowingPlan``.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: tile, stride or chunk is not positive, or a count or position is negative.

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
    reached = 0
    while reached < tiles and can_score_tile(reached * tile_size, block_stride, end):
        reached += 1
    past = 0
    rule = f"tile_start·{block_stride} ≤ {end}"
    if window is not None:
        rule = f"{q_chunk_start} − {window} < tile_end·{block_stride} and {rule}"
        oldest = q_chunk_start - window  # the first token that the first query still sees
        while past < reached and min((past + 1) * tile_size, num_blocks) * block_stride <= oldest:
            past += 1
    return WindowingPlan(end, tuple(range(past, reached)), tiles - reached, past, rule)
