"""Attention under intervals on a TPU: each tile of queries walks over the blocks of keys that its intervals touch.

The intervals' ends grow with the query, so the first and the last query of a tile say which blocks it needs: a plan is
two integers for each tile, made inside jit in O(T / tile), plus O(S) where there are documents.
"""

import jax
import jax.numpy as jnp

from kernel_index.jax.attention_contract import AttentionCall
from kernel_index.jax.attention_vjp import Plan, attend
from kernel_index.jax.block_walk import Walk, ranges
from kernel_index.jax.kernel_launch import TileMasks
from kernel_index.jax.mask import MaskContract
from kernel_index.jax.tile_layout import Sizes, choose_sizes, from_rows, from_tiles, to_blocks, to_columns, to_tiles
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


def interval_plan(mask: MaskContract, batch: int, queries: int, keys: int, sizes: Sizes) -> Plan:
    bounds = mask.intervals(batch, queries, keys)
    walk = interval_walk(mask, queries, keys, sizes.tile, sizes.block)
    return Plan(walk, TileMasks(to_columns(bounds, sizes), None))


def attention_pallas(call: AttentionCall, *, interpret: bool | None) -> tuple[jax.Array, jax.Array]:
    """``out`` [B, T, H, Dv] and ``lse`` [B, H, T], without the sink."""
    q, k, v = call.q, call.k, call.v
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    if batch * queries * keys == 0:
        return jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype), jnp.full((batch, heads, queries), -jnp.inf)
    sizes = choose_sizes(queries, keys, heads // kv_heads, call.block_sizes)
    setup = Setup(sizes.block, width**-0.5 if call.scale is None else call.scale, call.softcap, interpret)
    plan = interval_plan(call.mask, batch, queries, keys, sizes)
    tiled = to_tiles(q, kv_heads, sizes.tile), to_blocks(k, sizes.block), to_blocks(v, sizes.block)
    out, lse = attend(setup, plan, *tiled)
    return from_tiles(out, queries, sizes.tile), from_rows(lse, queries, sizes.tile)
