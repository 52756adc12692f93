"""Which keys each query may attend to, as bounds of integers, for JAX arrays: inside jit, without a value read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.masks.doc_window_mask.contract import Window


class Intervals(NamedTuple):
    """Query t attends to the keys ``start[t] ≤ s < end[t]``; int32, both non-decreasing along T."""

    start: jax.Array
    end: jax.Array


class RowBounds(NamedTuple):
    """Query t attends to key s iff ``start[t] ≤ s < end[t]`` and, in a tree, ``t < q_end[s]``.

    int32 [rows, T] and [rows, S]; ``q_end`` is None where the keys of every query are one interval.  In a tree a query
    may have ``start < end`` and no allowed key.
    """

    start: jax.Array
    end: jax.Array
    q_end: jax.Array | None


def allowed(bounds: RowBounds, key: jax.Array, query: jax.Array | None = None) -> jax.Array:
    """Which of all keys, ``key`` [S], the queries of the bounds may attend to, bool [rows, n, S].

    ``query`` [n]: their indices, in a tree; None where they are all queries.
    """
    seen = (key >= bounds.start[..., None]) & (key < bounds.end[..., None])
    if bounds.q_end is None:
        return seen
    query = jnp.arange(bounds.start.shape[1], dtype=jnp.int32) if query is None else query
    return seen & (query[..., None] < bounds.q_end[:, None])


class Documents(NamedTuple):
    """The document of each query: its keys ``low ≤ s < high``, and whether the query is ``outside`` of the keys."""

    low: jax.Array
    high: jax.Array
    outside: jax.Array


def segments(doc_ids: jax.Array) -> Intervals:
    """First position and end of the maximal run of equal ids around each position, int32 [rows, S]."""
    rows, keys = doc_ids.shape
    ids = jnp.maximum(doc_ids, -1)  # adjacent padding is one run, whatever its ids
    position = jnp.arange(keys, dtype=jnp.int32)
    is_new = jnp.concatenate([jnp.ones((rows, 1), bool), ids[:, 1:] != ids[:, :-1]], 1)
    start = lax.cummax(jnp.where(is_new, position, 0), axis=1)
    following = jnp.concatenate([jnp.where(is_new, position, keys)[:, 1:], jnp.full((rows, 1), keys)], 1)
    return Intervals(start, lax.cummin(following, axis=1, reverse=True))


def taken(x: jax.Array, at: jax.Array) -> jax.Array:
    """``x[b, at[b, i]]``, where x [rows, S] and at [rows, n] may each have one row for all."""
    if at.shape[0] == 1:
        return x[:, at[0]]
    return jnp.take_along_axis(jnp.broadcast_to(x, (at.shape[0], x.shape[1])), at, 1)


def documents_of(doc_ids: jax.Array, position: jax.Array) -> Documents:
    """From ids [rows, S] and the positions [rows or 1, n] of queries among the keys."""
    keys = doc_ids.shape[1]
    at = jnp.clip(position, 0, keys - 1)
    low, high = (taken(bound, at) for bound in segments(doc_ids))
    high = jnp.where(taken(doc_ids, at) < 0, low, high)
    return Documents(low, high, (position < 0) | (position >= keys))


def interval_of(
    query: jax.Array,
    position: jax.Array,
    keys: int,
    window: Window,
    documents: Documents | None,
    counts: jax.Array | None,
    key_counts: jax.Array | None,
    prefix: Any,
) -> Intervals:
    """The intervals of queries [n] at ``position`` [rows or 1, n], in O(n).

    Both bounds are non-decreasing; an empty interval is placed so that they stay so.
    """
    # The same formula for torch tensors is interval_of in masks/doc_window_mask/intervals.py: neither array library
    # can trace the other.  tests/jax/test_mask.py compares the two.
    left, right = window
    low, high = jnp.zeros_like(position), jnp.full_like(position, keys)
    outside, after = jnp.zeros(position.shape, bool), high
    if documents is not None:
        low, high, outside = documents
    document_low = low
    of_keys = counts if key_counts is None else key_counts
    if of_keys is not None:
        high, after = jnp.minimum(high, of_keys[:, None]), jnp.minimum(after, of_keys[:, None])
    if counts is not None:
        limit = counts[:, None]
        beyond = (position < 0) | (position >= limit) if key_counts is None else query[None] >= limit
        outside = outside | beyond
    nothing = jnp.where(position < 0, 0, after)
    low, high = jnp.where(outside, nothing, low), jnp.where(outside, nothing, high)
    end = high if right is None else jnp.minimum(high, position + (right + 1))
    end = jnp.maximum(end, 0)
    start = low if left is None else jnp.maximum(low, position - left)
    if prefix is not None:
        prefix_end = document_low + column(prefix)
        inside = (position >= document_low) & (position < prefix_end)
        start = jnp.where(inside, low, start)
        end = jnp.where(inside, jnp.maximum(end, jnp.minimum(high, prefix_end)), end)
    return Intervals(jnp.minimum(start, end), end)


def column(numbers: Any) -> jax.Array:
    """A number for all rows, or numbers [B], as int32 [1 or B, 1]."""
    return jnp.asarray(numbers, jnp.int32).reshape(-1, 1)
