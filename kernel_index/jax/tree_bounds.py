"""A prefix tree as bounds: each query's first key on its path, and for each key the end of the queries that see it.

The formulas are those of ``masks/prefix_tree/bounds.py``; here no value is read, so a row of chains is a tree as well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.jax.mask_bounds import Intervals, RowBounds, taken


class Tree(NamedTuple):
    """``subtree_end`` and ``positions`` [rows or 1, S] or None, and ``left`` of the window."""

    subtree_end: jax.Array | None
    positions: jax.Array | None
    left: int | None


def tree_bounds(bounds: Intervals, position: jax.Array, tree: Tree, keys: int) -> RowBounds:
    """The bounds of every query, int32 [rows, T] and [rows, S]; O(T + S), with a window O(T + S · log S).

    ``bounds``: the intervals [rows, T] by causality, documents and counts, without a window.  ``position``
    [rows or 1, T]: of each query among the keys.
    """
    start, end = bounds
    rows, queries = start.shape
    index = jnp.arange(keys, dtype=jnp.int32)
    until = jnp.full((1, keys), keys, jnp.int32) if tree.subtree_end is None else tree.subtree_end.astype(jnp.int32)
    first_query = position[:, :1] if queries else jnp.zeros((1, 1), jnp.int32)
    q_end = jnp.broadcast_to(jnp.clip(until - first_query, 0, queries), (rows, keys))
    if tree.left is None or queries * keys == 0:
        return RowBounds(start, end, q_end)
    if tree.positions is None:  # the window counts indices
        first = position - tree.left
    else:
        first = window_starts(parents_of(until), tree.positions.astype(jnp.int32), tree.left)
        first = jnp.where(until <= index, 0, first)  # the position of a gap says nothing
        first = taken(first, jnp.broadcast_to(jnp.clip(position, 0, keys - 1), (rows, queries)))
    return RowBounds(jnp.minimum(jnp.maximum(start, first), end), end, q_end)


def parents_of(until: jax.Array) -> jax.Array:
    """The last earlier token whose subtree holds each token, −1 for none; int32 [rows, S].

    A token continues the one before it, or, where subtrees end, what the first of these continues; a gap and the token
    after it continue what the place before them continues.  Pointers to those are followed by doubling.
    """
    rows, keys = until.shape
    index = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (rows, keys))
    row = jnp.arange(rows)[:, None]
    nowhere = jnp.full((rows, keys), keys, jnp.int32)
    ending = nowhere.at[row, jnp.where(until > index, until, keys)].min(index, mode="drop")
    before = jnp.maximum(index - 1, 0)
    ends_before = taken(until, before)
    continues = (ends_before > before) & (ends_before > index) & (index > 0)
    pointer = jnp.where(ending < index, ending, before)
    pointer = jnp.where(continues | (index == 0), index, pointer)
    pointer = lax.fori_loop(0, keys.bit_length(), lambda _, pointer: taken(pointer, pointer), pointer)
    return taken(jnp.where(continues, index - 1, -1), pointer)


def window_starts(parent: jax.Array, along: jax.Array, left: int) -> jax.Array:
    """The first token of each token's path whose position is at most ``left`` behind, [rows, S]; itself if none is."""
    rows, keys = parent.shape
    rows = max(rows, along.shape[0])
    parent, along = (jnp.broadcast_to(x, (rows, keys)) for x in (parent, along))
    first = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (rows, keys))
    up = [parent]
    for _ in range(min(left.bit_length(), keys.bit_length()) - 1):
        up.append(jnp.where(up[-1] >= 0, taken(up[-1], jnp.maximum(up[-1], 0)), -1))
    for step in reversed(up):
        higher = taken(step, first)
        inside = (higher >= 0) & (taken(along, jnp.maximum(higher, 0)) >= along - left)
        first = jnp.where(inside, higher, first)
    return first
