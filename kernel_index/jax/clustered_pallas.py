"""Clustered sparse attention on a TPU: scores of blocks, unions of tiles, attention over the unions.

1. ``pick_fused`` scores a tile of queries against the mean keys of the blocks and takes the best in one kernel, the
   scores never leave the chip; ``score_blocks`` writes them out, for selections that need them all.  Both stop at the
   first tile of blocks that lies wholly in the future (``can_score_tile``) and begin at the first inside the window.
2. The union of a tile's picks is plain JAX with static shapes: marks by comparison, a stable sort.
3. ``attend`` walks over the lists of the unions.  What a query did not pick itself is masked by block, what it may not
   see by its interval; places behind the end of a list are neither fetched nor computed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.attend import Plan, ascending, attend
from kernel_index.jax.layout import Sizes, ceil_to, from_rows, from_tiles, to_blocks, to_columns, to_tiles
from kernel_index.jax.mask import Intervals, MaskContract
from kernel_index.jax.routing import HIGHEST, LOWEST, LegalBlocks, num_blocks, ranks, tile_marks
from kernel_index.jax.tiles import NT, VMEM_LIMIT, Setup, Tiles, dot, result
from kernel_index.jax.walk import listed
from kernel_index.masks.causal_windowing_predicate.api import can_score_tile

SCORED_QUERIES = 256
SCORED_BLOCKS = 128
STEP_KEYS, MOST_BLOCKS = 512, 8
"""Keys that one step of phase 3 takes together, in at most so many blocks."""


def active_tiles(legal: LegalBlocks, ends: jax.Array, block_size: int, tiles: int) -> jax.Array:
    """For each tile of queries the tiles of blocks to score, first and end, int32 [rows, 2, query tiles].

    ``ends``: the position of the last query of each tile.  The rule is monotone, so a count is where to stop.
    """
    start = jnp.arange(tiles, dtype=jnp.int32) * SCORED_BLOCKS
    end = jnp.sum(can_score_tile(start, block_size, ends[:, None]), -1, dtype=jnp.int32)
    some = legal.current >= 0
    first = _per_tile(jnp.where(some, legal.first, HIGHEST), HIGHEST).min(-1) // SCORED_BLOCKS
    any_query = _per_tile(some, False).any(-1)
    end = jnp.where(any_query, end, 0)
    return jnp.stack([jnp.minimum(first, end), end], 1)


def _per_tile(x: jax.Array, behind: Any) -> jax.Array:
    """[rows, T] as [rows, tiles, queries]."""
    tiles = -(-x.shape[1] // SCORED_QUERIES)
    padded = jnp.pad(x, ((0, 0), (0, tiles * SCORED_QUERIES - x.shape[1])), constant_values=behind)
    return padded.reshape(x.shape[0], tiles, SCORED_QUERIES)


def _scored_tiles(spans: Any, body: Any) -> None:
    row = pl.program_id(2)

    def step(j: Any, _: Any) -> Any:
        body(j, pl.multiple_of(j * SCORED_BLOCKS, SCORED_BLOCKS))
        return 0

    lax.fori_loop(spans[0, 0, row], spans[0, 1, row], step, 0)


def _score_kernel(spans: Any, q_ref: Any, means_ref: Any, scores_ref: Any) -> None:
    scores_ref[...] = jnp.full_like(scores_ref, -jnp.inf)

    def body(_: Any, at: Any) -> None:
        blocks = pl.ds(at, SCORED_BLOCKS)
        scores_ref[0, 0, :, blocks] = dot(q_ref[0, 0], means_ref[0, 0, blocks], NT)

    _scored_tiles(spans, body)


def _pick_kernel(spans: Any, legal_ref: Any, q_ref: Any, means_ref: Any, picks_ref: Any, keys_ref: Any) -> None:
    topk = picks_ref.shape[3]
    keys_ref[...] = jnp.full_like(keys_ref, LOWEST)
    first, current = legal_ref[0, 0, 0:1], legal_ref[0, 0, 1:2]

    def body(_: Any, at: Any) -> None:
        s = dot(means_ref[0, 0, pl.ds(at, SCORED_BLOCKS)], q_ref[0, 0], NT)
        block = lax.broadcasted_iota(jnp.int32, s.shape, 0) + at
        keys = jnp.where((block >= first) & (block < current), ranks(s), LOWEST)
        keys_ref[pl.ds(at, SCORED_BLOCKS)] = jnp.where(block == current, HIGHEST, keys)

    _scored_tiles(spans, body)

    def take_best(i: Any, _: Any) -> Any:
        keys = keys_ref[...]
        block = lax.broadcasted_iota(jnp.int32, keys.shape, 0)
        best = jnp.max(keys, 0, keepdims=True)
        place = jnp.min(jnp.where(keys == best, block, HIGHEST), 0, keepdims=True)  # of equal ones the smallest
        picks_ref[0, 0, 0, pl.ds(i, 1)] = jnp.where(best > LOWEST, place, HIGHEST)
        keys_ref[...] = jnp.where(block == place, LOWEST, keys)
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
    queries: jax.Array, means: jax.Array, legal: LegalBlocks, ends: jax.Array, block_size: int, interpret: bool
) -> jax.Array:
    """float32 [B, T, K, blocks], −inf where a tile lies wholly in the future or before the window."""
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


def pick_fused(
    queries: jax.Array,
    means: jax.Array,
    legal: LegalBlocks,
    ends: jax.Array,
    block_size: int,
    topk: int,
    interpret: bool,
) -> jax.Array:
    """What ``top_blocks`` takes of ``score_blocks``, int32 [B, T, K, topk], without writing the scores."""
    (spans, q, means), (spans_spec, q_spec, means_spec), grid = _scoring_operands(
        queries, means, legal, ends, block_size
    )
    bounds = jnp.stack([_per_tile(legal.first, 0), _per_tile(legal.current, -1)], 2)
    alike = bounds.shape[0] == 1
    picks = pl.pallas_call(
        _pick_kernel,
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
    picks = picks.swapaxes(3, 4).reshape(*grid[:2], -1, topk)[:, :, : queries.shape[1]].swapaxes(1, 2)
    picks = jnp.sort(picks, -1)
    return jnp.where(picks < HIGHEST, picks, -1)


def chunk_ends(mask: MaskContract, queries: int, keys: int) -> jax.Array:
    """The position of the last query of each scored tile, int32 [tiles]."""
    offset = keys - queries if mask.q_offset is None else mask.q_offset
    first = jnp.arange(0, queries, SCORED_QUERIES, dtype=jnp.int32)
    return jnp.minimum(first + (SCORED_QUERIES - 1), queries - 1) + offset


def step_blocks(block_size: int, interpret: bool) -> int:
    """Blocks of one step.  The copies of a step are written out one by one, which the interpreter takes badly."""
    return 2 if interpret else min(MOST_BLOCKS, max(1, STEP_KEYS // block_size))


def union_plan(selected: jax.Array, bounds: Intervals, keys: int, sizes: Sizes, width: int) -> Plan:
    """Phase 2: the walk of phase 3, from the picks int32 [B, T, K, n] (−1 for none)."""
    blocks = num_blocks(keys, sizes.block)
    order, counts = ascending(tile_marks(selected, sizes.tile, blocks).swapaxes(1, 2))
    walk = listed(order[..., : min(sizes.tile * selected.shape[3], blocks)], counts, width)
    return Plan(walk, Tiles(to_columns(bounds, sizes), member_words(selected, blocks, sizes)))


def member_words(selected: jax.Array, blocks: int, sizes: Sizes) -> jax.Array:
    """``Tiles.members`` of the picks: a bit for each query and block."""
    batch, queries, kv_heads, _ = selected.shape
    words, tiles = -(-blocks // 32), -(-queries // sizes.tile)
    of_word = jnp.arange(words, dtype=jnp.int32) == (selected >> 5)[..., None]  # none for −1
    bits = jnp.where(of_word, (jnp.int32(1) << (selected & 31))[..., None], 0)
    member = lax.reduce(bits, jnp.int32(0), lax.bitwise_or, (3,))  # a block picked twice counts once
    padded = jnp.pad(member, ((0, 0), (0, tiles * sizes.tile - queries), (0, 0), (0, 0)))
    own = padded.reshape(batch, tiles, sizes.tile, kv_heads, words).transpose(0, 3, 1, 4, 2)
    return jnp.tile(own, (1, 1, 1, 1, sizes.groups))[:, :, :, :, None]


def attend_selected(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selected: jax.Array,
    bounds: Intervals,
    *,
    block_size: int,
    tile_size: int,
    scale: float | None,
    softcap: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Phases 2 and 3: ``out`` [B, T, H, Dv] and ``lse`` [B, H, T] over the picked blocks; differentiable in q, k, v."""
    queries, heads, width = q.shape[1:]
    keys, kv_heads = k.shape[1:3]
    sizes = Sizes(tile_size, block_size, heads // kv_heads)
    setup = Setup(block_size, width**-0.5 if scale is None else scale, softcap, interpret)
    plan = union_plan(lax.stop_gradient(selected), bounds, keys, sizes, step_blocks(block_size, interpret))
    tiled = to_tiles(q, kv_heads, tile_size), to_blocks(k, block_size), to_blocks(v, block_size)
    out, lse = attend(setup, plan, *tiled)
    return from_tiles(out, queries, tile_size), from_rows(lse, queries, tile_size)
