"""The layout that Pallas kernels read, [B, T, H, D] as tiles and back; and the sizes of tiles and blocks."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

COLUMNS, QUERIES, KEYS = 1024, 512, 512
"""Upper bounds for interval attention: queries × heads of a tile, queries of a tile, keys of a block.

More columns read the keys less often.  More queries or keys compute more scores that a mask discards.
"""
SMALLEST = 16
"""Rows of a bfloat16 vector register."""


LANES = 128
"""Columns of a vector register."""


class Sizes(NamedTuple):
    """``tile`` queries and ``block`` keys at once; ``groups`` query heads for each KV head."""

    tile: int
    block: int
    groups: int


def ceil_to(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def choose_sizes(queries: int, keys: int, groups: int, block_sizes: tuple[int, int] | None) -> Sizes:
    """The sizes for a call, or those that the caller gives."""
    if block_sizes is not None:
        return Sizes(*block_sizes, groups)
    tile = min(QUERIES, max(SMALLEST, next_power_of_2(COLUMNS // groups + 1) // 2))
    tile = min(tile, max(SMALLEST, next_power_of_2(queries)))
    return Sizes(tile, min(KEYS, max(SMALLEST, next_power_of_2(keys))), groups)


def to_tiles(x: jax.Array, kv_heads: int, tile: int) -> jax.Array:
    """[B, T, H, D] as [B, K, tiles, G · tile, D], zeros after the last query."""
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


def from_rows(x: jax.Array, queries: int, tile: int) -> jax.Array:
    """[B, K, tiles, 1, G · tile] as [B, H, T]."""
    return from_tiles(jnp.swapaxes(x, 3, 4), queries, tile)[..., 0].swapaxes(1, 2)


def to_blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, S, K, D] as [B, K, S', D] with S' a multiple of the block."""
    keys = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, ceil_to(keys, block) - keys), (0, 0), (0, 0))).swapaxes(1, 2)


def to_columns(numbers: Sequence[jax.Array], sizes: Sizes) -> jax.Array:
    """n numbers [B', T] of each query as int32 [B', tiles, n, G · tile]; 0 for padding queries."""
    stacked = jnp.stack(numbers, 1).astype(jnp.int32)  # [B', n, T]
    rows, count, queries = stacked.shape
    tiles = -(-queries // sizes.tile)
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, tiles * sizes.tile - queries)))
    stacked = stacked.reshape(rows, count, tiles, sizes.tile).swapaxes(1, 2)  # [B', tiles, n, tile]
    return jnp.tile(stacked, (1, 1, 1, sizes.groups))


def to_key_rows(numbers: jax.Array, block: int) -> jax.Array:
    """A number of each key [B', S] as int32 [B', blocks, 1, L], L the block in whole vector registers; 0 as padding."""
    rows, keys = numbers.shape
    blocks = -(-keys // block)
    padded = jnp.pad(numbers, ((0, 0), (0, blocks * block - keys))).reshape(rows, blocks, 1, block)
    return jnp.pad(padded, ((0, 0), (0, 0), (0, 0), (0, ceil_to(block, LANES) - block)))
