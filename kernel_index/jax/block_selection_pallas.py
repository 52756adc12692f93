"""Phase 1 of clustered sparse attention on a TPU: scores of blocks, and the best of them for each query.

``select_fused`` scores a tile of queries against the mean keys of the blocks and selects the best in one kernel; the
scores never leave the chip.  ``score_blocks`` writes them out, for selections that need them all.  Both stop at the
first tile of blocks that lies wholly in the future (``can_score_tile``) and begin at the first inside the window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.kernel_launch import VMEM_LIMIT, result
from kernel_index.jax.mask import MaskContract
from kernel_index.jax.routing import HIGHEST, LOWEST, LegalBlocks, score_order
from kernel_index.jax.tile_layout import ceil_to
from kernel_index.jax.tile_scores import NT, dot
from kernel_index.masks.causal_windowing_predicate.api import can_score_tile

SCORED_QUERIES = 256
SCORED_BLOCKS = 128


def active_tiles(legal: LegalBlocks, ends: jax.Array, block_size: int, tiles: int) -> jax.Array:
    """The tiles of blocks that each tile of queries scores, first and end, int32 [rows, 2, query tiles].

    ``ends``: the position of the last query of each tile.  ``can_score_tile`` is monotone, so the number of tiles that
    it allows is the end.
    """
    start = jnp.arange(tiles, dtype=jnp.int32) * SCORED_BLOCKS
    end = jnp.sum(can_score_tile(start, block_size, ends[:, None]), -1, dtype=jnp.int32)
    attends = legal.current >= 0
    first = _per_tile(jnp.where(attends, legal.first, HIGHEST), HIGHEST).min(-1) // SCORED_BLOCKS
    any_query = _per_tile(attends, False).any(-1)
    end = jnp.where(any_query, end, 0)
    return jnp.stack([jnp.minimum(first, end), end], 1)


def _per_tile(x: jax.Array, padding: Any) -> jax.Array:
    """[rows, T] as [rows, tiles, SCORED_QUERIES]."""
    tiles = -(-x.shape[1] // SCORED_QUERIES)
    padded = jnp.pad(x, ((0, 0), (0, tiles * SCORED_QUERIES - x.shape[1])), constant_values=padding)
    return padded.reshape(x.shape[0], tiles, SCORED_QUERIES)


def _over_scored_tiles(spans: Any, body: Any) -> None:
    """``body(tile, its first block)`` for each tile of blocks that this tile of queries scores."""
    row = pl.program_id(2)

    def tile(j: Any, _: Any) -> Any:
        body(j, pl.multiple_of(j * SCORED_BLOCKS, SCORED_BLOCKS))
        return 0

    lax.fori_loop(spans[0, 0, row], spans[0, 1, row], tile, 0)


def _score_kernel(spans: Any, q_ref: Any, means_ref: Any, scores_ref: Any) -> None:
    scores_ref[...] = jnp.full_like(scores_ref, -jnp.inf)

    def body(_: Any, at: Any) -> None:
        blocks = pl.ds(at, SCORED_BLOCKS)
        scores_ref[0, 0, :, blocks] = dot(q_ref[0, 0], means_ref[0, 0, blocks], NT)  # [queries, blocks]

    _over_scored_tiles(spans, body)


def _select_kernel(spans: Any, legal_ref: Any, q_ref: Any, means_ref: Any, selected_ref: Any, keys_ref: Any) -> None:
    topk = selected_ref.shape[3]
    keys_ref[...] = jnp.full_like(keys_ref, LOWEST)  # [blocks, queries], integers in the order of the scores
    first, current = legal_ref[0, 0, 0:1], legal_ref[0, 0, 1:2]  # [1, queries]

    def body(_: Any, at: Any) -> None:
        s = dot(means_ref[0, 0, pl.ds(at, SCORED_BLOCKS)], q_ref[0, 0], NT)  # [blocks, queries]
        block = lax.broadcasted_iota(jnp.int32, s.shape, 0) + at
        keys = jnp.where((block >= first) & (block < current), score_order(s), LOWEST)
        keys_ref[pl.ds(at, SCORED_BLOCKS)] = jnp.where(block == current, HIGHEST, keys)

    _over_scored_tiles(spans, body)

    def take_best(i: Any, _: Any) -> Any:
        keys = keys_ref[...]
        block = lax.broadcasted_iota(jnp.int32, keys.shape, 0)
        best = jnp.max(keys, 0, keepdims=True)  # [1, queries]
        index = jnp.min(jnp.where(keys == best, block, HIGHEST), 0, keepdims=True)  # of equal ones the smallest
        selected_ref[0, 0, 0, pl.ds(i, 1)] = jnp.where(best > LOWEST, index, HIGHEST)
        keys_ref[...] = jnp.where(block == index, LOWEST, keys)
        return 0

    lax.fori_loop(0, topk, take_best, 0)


def _scoring_operands(
    queries: jax.Array, means: jax.Array, legal: LegalBlocks, ends: jax.Array, block_size: int
) -> tuple[list[Any], list[pl.BlockSpec], tuple[int, ...]]:
    """Spans, queries [B, K, T', D] and means [B, K, blocks', D], their specs, and the grid."""
    batch, count, groups, width = queries.shape
    blocks = ceil_to(means.shape[1], SCORED_BLOCKS)
    spans = active_tiles(legal, ends, block_size, blocks // SCORED_BLOCKS)
    alike = spans.shape[0] == 1
    q = jnp.pad(queries, ((0, 0), (0, ceil_to(count, SCORED_QUERIES) - count), (0, 0), (0, 0))).swapaxes(1, 2)
    means = jnp.pad(means, ((0, 0), (0, blocks - means.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
    specs = [
        pl.BlockSpec((1, *spans.shape[1:]), lambda b, h, r: (0 if alike else b, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, SCORED_QUERIES, width), lambda b, h, r: (b, h, r, 0)),
        pl.BlockSpec((1, 1, blocks, width), lambda b, h, r: (b, h, 0, 0)),
    ]
    return [spans, q, means], specs, (batch, groups, q.shape[2] // SCORED_QUERIES)


def _params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


def score_blocks(
    block_size: int, interpret: bool, queries: jax.Array, means: jax.Array, legal: LegalBlocks, ends: jax.Array
) -> jax.Array:
    """Scores float32 [B, T, K, blocks], −inf where a tile lies wholly in the future or before the window."""
    operands, specs, grid = _scoring_operands(queries, means, legal, ends, block_size)
    blocks = operands[2].shape[2]
    scores = pl.pallas_call(
        _score_kernel,
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((1, 1, SCORED_QUERIES, blocks), lambda b, h, r: (b, h, r, 0)),
        out_shape=result((*grid[:2], grid[2] * SCORED_QUERIES, blocks), jnp.float32, queries),
        compiler_params=_params(),
        name="clustered_scores",
        interpret=interpret,
    )(*operands)
    return scores[:, :, : queries.shape[1], : means.shape[1]].swapaxes(1, 2)


def select_fused(
    topk: int,
    block_size: int,
    interpret: bool,
    queries: jax.Array,
    means: jax.Array,
    legal: LegalBlocks,
    ends: jax.Array,
) -> jax.Array:
    """``top_blocks`` of ``score_blocks``, int32 [B, T, K, topk], without writing the scores."""
    (spans, q, means), (spans_spec, q_spec, means_spec), grid = _scoring_operands(
        queries, means, legal, ends, block_size
    )
    bounds = jnp.stack([_per_tile(legal.first, 0), _per_tile(legal.current, -1)], 2)
    alike = bounds.shape[0] == 1
    selected = pl.pallas_call(
        _select_kernel,
        grid=grid,
        in_specs=[
            spans_spec,
            pl.BlockSpec((1, 1, 2, SCORED_QUERIES), lambda b, h, r: (0 if alike else b, r, 0, 0)),
            q_spec,
            means_spec,
        ],
        out_specs=pl.BlockSpec((1, 1, 1, topk, SCORED_QUERIES), lambda b, h, r: (b, h, r, 0, 0)),
        out_shape=result((*grid, topk, SCORED_QUERIES), jnp.int32, queries),
        scratch_shapes=[pltpu.VMEM((means.shape[2], SCORED_QUERIES), jnp.int32)],
        compiler_params=_params(),
        name="clustered_picks",
        interpret=interpret,
    )(spans, bounds, q, means)
    selected = selected.swapaxes(3, 4).reshape(*grid[:2], -1, topk)[:, :, : queries.shape[1]].swapaxes(1, 2)
    selected = jnp.sort(selected, -1)
    return jnp.where(selected < HIGHEST, selected, -1)


def tile_ends(mask: MaskContract, queries: int, keys: int) -> jax.Array:
    """The position of the last query of each scored tile, int32 [tiles]."""
    offset = keys - queries if mask.q_offset is None else mask.q_offset
    first = jnp.arange(0, queries, SCORED_QUERIES, dtype=jnp.int32)
    return jnp.minimum(first + (SCORED_QUERIES - 1), queries - 1) + offset
