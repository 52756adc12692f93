"""Attention under intervals on a TPU: each tile of queries walks over the blocks of keys that its intervals touch.

The intervals' ends grow with the query, so the first and the last query of a tile say which blocks it needs: a plan is
two integers for each tile, made inside jit in O(T / tile), plus O(S) where there are documents.

In a prefix tree a tile needs the blocks of its path, which need not follow each other: it walks over a list.
"""

import jax
import jax.numpy as jnp

from kernel_index.jax.attention_contract import AttentionCall
from kernel_index.jax.attention_vjp import Plan, attend
from kernel_index.jax.block_walk import Walk, listed, marked_first, ranges
from kernel_index.jax.kernel_launch import TileMasks
from kernel_index.jax.mask import MaskContract
from kernel_index.jax.mask_bounds import RowBounds
from kernel_index.jax.tile_layout import (
    Sizes,
    choose_sizes,
    from_rows,
    from_tiles,
    to_blocks,
    to_columns,
    to_key_rows,
    to_tiles,
)
from kernel_index.jax.tile_scores import Setup


def interval_walk(mask: MaskContract, queries: int, keys: int, tile: int, block: int) -> Walk:
    """The blocks that each tile visits: ``first ≤ j < first + count``, both ends non-decreasing."""
    first = jnp.arange(0, queries, tile, dtype=jnp.int32)  # [tiles]
    last = jnp.minimum(first + (tile - 1), queries - 1)
    start, end = mask.bounds_of(jnp.concatenate([first, last]), queries, keys)  # [B', 2 · tiles]
    tiles = first.shape[0]
    low, high = start[:, :tiles], end[:, tiles:]  # [B', tiles]
    begin = low // block
    return ranges(begin, jnp.where(high > low, -(-high // block) - begin, 0))


def tree_walk(bounds: RowBounds, tile: int, block: int) -> Walk:
    """The blocks that each tile visits in a tree, as lists; O(T + S), and one comparison for each tile and block.

    A block is left out where the extremes of its keys and of the tile's queries show that none of them sees another.
    """
    start, end, q_end = bounds
    assert q_end is not None
    nobody = jnp.iinfo(jnp.int32).max
    low = _by_tile(jnp.where(start < end, start, nobody), tile, nobody).min(2)  # [B', tiles]
    high = _by_tile(jnp.where(start < end, end, 0), tile, 0).max(2)
    seen_until = _by_tile(q_end, block, 0).max(2)  # [B', blocks]
    first_query = jnp.arange(low.shape[1], dtype=jnp.int32)[:, None] * tile
    first_key = jnp.arange(seen_until.shape[1], dtype=jnp.int32) * block
    visited = (first_key + block > low[..., None]) & (first_key < high[..., None])  # [B', tiles, blocks]
    lists, counts = marked_first(visited & (first_query < seen_until[:, None]))
    return listed(lists[:, None], counts[:, None], width=1)


def _by_tile(x: jax.Array, size: int, filler: int) -> jax.Array:
    """[B', n] as [B', tiles, size], ``filler`` after the last."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=filler)
    return padded.reshape(x.shape[0], -1, size)


def attention_plan(mask: MaskContract, batch: int, queries: int, keys: int, sizes: Sizes) -> Plan:
    bounds = mask.row_bounds(batch, queries, keys)
    start, end, q_end = bounds
    if q_end is None:
        walk = interval_walk(mask, queries, keys, sizes.tile, sizes.block)
        return Plan(walk, TileMasks(to_columns((start, end), sizes)))
    query = jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32), start.shape)
    masks = TileMasks(to_columns((start, end, query), sizes), q_end=to_key_rows(q_end, sizes.block))
    return Plan(tree_walk(bounds, sizes.tile, sizes.block), masks)


def attention_pallas(call: AttentionCall, *, interpret: bool | None) -> tuple[jax.Array, jax.Array]:
    """``out`` [B, T, H, Dv] and ``lse`` [B, H, T], without the sink."""
    q, k, v = call.q, call.k, call.v
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    if batch * queries * keys == 0:
        return jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype), jnp.full((batch, heads, queries), -jnp.inf)
    sizes = choose_sizes(queries, keys, heads // kv_heads, call.block_sizes)
    setup = Setup(sizes.block, width**-0.5 if call.scale is None else call.scale, call.softcap, interpret)
    plan = attention_plan(call.mask, batch, queries, keys, sizes)
    tiled = to_tiles(q, kv_heads, sizes.tile), to_blocks(k, sizes.block), to_blocks(v, sizes.block)
    out, lse = attend(setup, plan, *tiled)
    return from_tiles(out, queries, sizes.tile), from_rows(lse, queries, sizes.tile)
