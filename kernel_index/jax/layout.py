"""From [B, T, H, D] to tiles and back, and how large tiles and blocks are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernel_index.jax.mask import Intervals

COLUMNS, QUERIES, KEYS = 1024, 512, 512
"""Queries × heads of a tile, queries of it, and keys of a block, for interval attention.  More columns read keys less
often; more queries or keys compute more scores that a mask discards.
"""
SMALLEST = 16
"""Rows of a bfloat16 vector register."""


class Sizes(NamedTuple):
    """``tile`` queries and ``block`` keys at once; ``groups`` query heads for each key head."""

    tile: int
    block: int
    groups: int


def ceil_to(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def pick_sizes(queries: int, keys: int, groups: int, block_sizes: tuple[int, int] | None) -> Sizes:
    """The geometry for a call, or the one that the caller wants."""
    if block_sizes is not None:
        return Sizes(*block_sizes, groups)
    tile = min(QUERIES, max(SMALLEST, next_power_of_2(COLUMNS // groups + 1) // 2))
    tile = min(tile, max(SMALLEST, next_power_of_2(queries)))
    return Sizes(tile, min(KEYS, max(SMALLEST, next_power_of_2(keys))), groups)


def to_tiles(x: jax.Array, kv_heads: int, tile: int) -> jax.Array:
    """[B, T, H, D] as [B, K, tiles, G · tile, D], zeros behind the last query."""
    batch, queries, heads, width = x.shape
    tiles = -(-queries // tile)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - queries), (0, 0), (0, 0)))
    x = x.reshape(batch, tiles, tile, kv_heads, heads // kv_heads, width)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(batch, kv_heads, tiles, -1, width)


def from_tiles(x: jax.Array, queries: int, tile: int) -> jax.Array:
    """The inverse of ``to_tiles``."""
    batch, kv_heads, tiles, columns, width = x.shape
    groups = columns // tile
    x = x.reshape(batch, kv_heads, tiles, groups, tile, width).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, tiles * tile, kv_heads * groups, width)[:, :queries]


def to_rows(x: jax.Array, kv_heads: int, tile: int) -> jax.Array:
    """[B, H, T] as [B, K, tiles, 1, G · tile]."""
    return jnp.swapaxes(to_tiles(x.swapaxes(1, 2)[..., None], kv_heads, tile), 3, 4)


def from_rows(x: jax.Array, queries: int, tile: int) -> jax.Array:
    """The inverse of ``to_rows``."""
    return from_tiles(jnp.swapaxes(x, 3, 4), queries, tile)[..., 0].swapaxes(1, 2)


def to_blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, S, K, D] as [B, K, S', D] with S' a multiple of the block."""
    keys = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, ceil_to(keys, block) - keys), (0, 0), (0, 0))).swapaxes(1, 2)


def to_columns(bounds: Intervals, sizes: Sizes) -> jax.Array:
    """Intervals [B', T] as int32 [B', tiles, 2, G · tile]; queries that do not exist see nothing."""
    both = jnp.stack(bounds, 1).astype(jnp.int32)
    rows, _, queries = both.shape
    tiles = -(-queries // sizes.tile)
    both = jnp.pad(both, ((0, 0), (0, 0), (0, tiles * sizes.tile - queries)))
    both = both.reshape(rows, 2, tiles, sizes.tile).swapaxes(1, 2)
    return jnp.tile(both, (1, 1, 1, sizes.groups))
