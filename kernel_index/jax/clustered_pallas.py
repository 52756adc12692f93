"""Phases 2 and 3 of clustered sparse attention on a TPU: unions of tiles, and attention over the unions.

Phase 2, the union of the blocks selected for a tile, is plain JAX with static shapes: marks by comparison, then a
stable sort.  Phase 3, ``attend``, walks over the lists of the unions.  Blocks that were not selected for a query are
masked by ``TileMasks.members``, keys that it may not attend to by its interval.  Entries after the end of a list are
neither fetched nor computed.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.jax.attention_vjp import Plan, attend
from kernel_index.jax.block_walk import listed, marked_first
from kernel_index.jax.kernel_launch import TileMasks
from kernel_index.jax.mask_bounds import Intervals
from kernel_index.jax.routing import num_blocks, tile_marks
from kernel_index.jax.tile_layout import Sizes, from_rows, from_tiles, to_blocks, to_columns, to_tiles
from kernel_index.jax.tile_scores import Setup

CHUNK_KEYS, MOST_BLOCKS = 512, 8
"""Keys of a chunk of phase 3, which holds at most so many blocks."""


def chunk_blocks(block_size: int) -> int:
    """Blocks of a chunk."""
    return min(MOST_BLOCKS, max(1, CHUNK_KEYS // block_size))


def union_plan(selected: jax.Array, bounds: Intervals, keys: int, sizes: Sizes, width: int) -> Plan:
    """Phase 2: the walk of phase 3, from the selected blocks int32 [B, T, K, n] (−1 for none)."""
    blocks = num_blocks(keys, sizes.block)
    order, counts = marked_first(tile_marks(selected, sizes.tile, blocks).swapaxes(1, 2))
    walk = listed(order[..., : min(sizes.tile * selected.shape[3], blocks)], counts, width)
    return Plan(walk, TileMasks(to_columns(bounds, sizes), member_words(selected, blocks, sizes)))


def member_words(selected: jax.Array, blocks: int, sizes: Sizes) -> jax.Array:
    """``TileMasks.members`` of the selected blocks: a bit for each query and block."""
    batch, queries, kv_heads, _ = selected.shape
    words, tiles = -(-blocks // 32), -(-queries // sizes.tile)
    of_word = jnp.arange(words, dtype=jnp.int32) == (selected >> 5)[..., None]  # [B, T, K, n, words], none for −1
    bits = jnp.where(of_word, (jnp.int32(1) << (selected & 31))[..., None], 0)
    member = lax.reduce(bits, jnp.int32(0), lax.bitwise_or, (3,))  # OR: a block may be selected twice
    padded = jnp.pad(member, ((0, 0), (0, tiles * sizes.tile - queries), (0, 0), (0, 0)))
    of_tile = padded.reshape(batch, tiles, sizes.tile, kv_heads, words).transpose(0, 3, 1, 4, 2)
    return jnp.tile(of_tile, (1, 1, 1, 1, sizes.groups))[:, :, :, :, None]


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
    interpret: bool | None,
) -> tuple[jax.Array, jax.Array]:
    """Phases 2 and 3: ``out`` [B, T, H, Dv] and ``lse`` [B, H, T]; differentiable in q, k and v."""
    queries, heads, width = q.shape[1:]
    keys, kv_heads = k.shape[1:3]
    sizes = Sizes(tile_size, block_size, heads // kv_heads)
    setup = Setup(block_size, width**-0.5 if scale is None else scale, softcap, interpret)
    plan = union_plan(lax.stop_gradient(selected), bounds, keys, sizes, chunk_blocks(block_size))
    tiled = to_tiles(q, kv_heads, tile_size), to_blocks(k, block_size), to_blocks(v, block_size)
    out, lse = attend(setup, plan, *tiled)
    return from_tiles(out, queries, tile_size), from_rows(lse, queries, tile_size)
